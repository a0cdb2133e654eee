"""Each task: rows to conversations, bad rows by file, line and field, answers to scores; and a task of one's own."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import evaluate
import pytest

from stages import rows
from stages.conversation import Conversation
from stages.refusal import Refusal
from stages.rows import Record
from stages.tasks import chat, instructions, quotes, text_to_sql

ROOT = Path(__file__).parent.parent
TASKS = sorted(path.stem for path in (ROOT / "stages/tasks").glob("[a-z]*.py"))


def records(*fields: dict, name: str = "mine.jsonl") -> dict:
    return {"rows": iter([Record(f"{name} line {number}", row) for number, row in enumerate(fields, start=1)])}


def only(found) -> Conversation:
    (conversation,) = found
    return conversation


def texts(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


# quotes

QUOTES = quotes.Options(name="quotes", rows="mine.jsonl", given_words=4, longest=200)
EMERSON = {"quote": "The only way to have\n a friend is to be one. ", "author": "Emerson, Essays"}


def test_a_quotation_is_given_by_its_first_words_and_completed_with_its_author():
    found = only(quotes.conversations(records(EMERSON), QUOTES))
    assert texts(found) == [
        ("user", "Quote: The only way to"),
        ("assistant", "Quote: The only way to have a friend is to be one.\nAuthor: Emerson"),
    ]
    assert found.groups == {"author": "emerson", "quote": "the only way to have a friend is to be one."}


def test_fortunes_are_read_and_those_without_an_author_or_too_long_are_left_out(tmp_path):
    path = tmp_path / "wisdom"
    path.write_text(
        'Wit is educated\n\tinsolence.\n\t\t-- Aristotle, "Rhetoric"\n%\nNobody said this.\n%\n'
        f"{'long ' * 50}\n-- Somebody\n%\n \n-- Nobody\n%\n"
    )
    found = only(quotes.conversations({"rows": rows.read(path)}, QUOTES))
    assert found.where == "wisdom line 1"
    assert found.reference == "Quote: Wit is educated insolence.\nAuthor: Aristotle"


@pytest.mark.parametrize(
    ("answer", "form", "author", "exact"),
    [
        ("Quote: The only way to have a friend is to be one.\nAuthor: Emerson", True, True, True),
        ("  Quote: The only way.\nAuthor: EMERSON (1841)\n", True, True, False),
        ("Quote: The only way to have a friend is to be one.\nAuthor: Aristotle", True, False, False),
        ("The only way to have a friend is to be one. Author: Emerson", False, False, False),
        ("Quote: x\nAuthor: Emerson\nAuthor: Aristotle", True, False, False),
        ("", False, False, False),
    ],
)
def test_a_quotation_is_scored_by_its_form_and_its_author(answer, form, author, exact):
    rows = list(quotes.conversations(records(EMERSON), QUOTES))
    (found,) = quotes.score(rows, [answer], QUOTES, [])
    assert (found["right_form"], found["right_author"], found["exact_match"]) == (form, author, exact)


def test_a_quotation_is_scored_by_how_much_of_it_is_there():
    rows = list(quotes.conversations(records(EMERSON), QUOTES))
    answers = [rows[0].reference, "Quote: The only way to have a friend.\nAuthor: Emerson", "Quote: x\nAuthor: y"]
    whole, half, nothing = (score["chrf"] for score in quotes.score(rows * 3, answers, QUOTES, []))
    assert whole == pytest.approx(1) and 0.3 < half < 0.8 and nothing < 0.05


FRIEND = "Quote: The only way to have a friend is to be one.\nAuthor: Emerson"
LEARNED = [FRIEND, "Quote: Wit is educated insolence, and a friend is to be one that laughs.\nAuthor: Aristotle"]


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (FRIEND, 9 / 9),  # have … one, author, Emerson: The only way to is the prompt's
        ("The only way to have a friend is to be one.\nAuthor: Emerson", 9 / 9),
        ("Quote: The only way to HAVE a friend -- is to be, one day, honest.\nAuthor: Mill", 7 / 11),
        ("Quote: The only way to have a friend is to be near.\nAuthor: Emerson", 6 / 9),
        ("Quote: The only way to have a friend is to like one.\nAuthor: Emerson", 0),  # runs of five and of three
        ("Quote: The only way to wit is educated insolence, and a foe.\nAuthor: Emerson", 6 / 9),
        ("Quote: The only way to", 0),
        ("Quote: The only way", 0),
        ("", 0),
    ],
)
def test_a_quotation_is_memorised_as_far_as_its_own_words_stand_in_the_training_rows(answer, share):
    rows = list(quotes.conversations(records(EMERSON), QUOTES))
    (found,) = quotes.score(rows, [answer], QUOTES, iter(LEARNED))
    assert found["memorised"] == pytest.approx(share)


def test_a_word_of_two_copied_runs_counts_once_and_runs_of_two_rows_both_count():
    rows = list(quotes.conversations(records(EMERSON), QUOTES))
    both = "Quote: The only way to have a friend is to be one that laughs"
    assert next(quotes.score(rows, [both], QUOTES, iter(LEARNED)))["memorised"] == 1
    assert next(quotes.score(rows, [both], QUOTES, iter(LEARNED[:1])))["memorised"] == pytest.approx(7 / 9)


def test_what_one_answer_copies_counts_for_no_other():
    rows = list(quotes.conversations(records(EMERSON), QUOTES))
    scored = quotes.score(rows * 3, ["It is new.", FRIEND, "Nobody has ever said this before."], QUOTES, iter(LEARNED))
    assert [score["memorised"] for score in scored] == [0, 1, 0]


# instructions


def alpaca(headings: str = "english") -> instructions.Options:
    return instructions.Options(name="instructions", rows="mine.jsonl", headings=headings)


def test_an_instruction_with_an_input_has_both_headings():
    row = {"instruction": " Add. ", "input": "1 and 2", "output": " 3\n"}
    assert texts(only(instructions.conversations(records(row), alpaca()))) == [
        ("user", "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize("row", [{"input": ""}, {"input": " \n"}, {}])
def test_an_empty_input_has_no_heading(row):
    row = {"instruction": "Say hello.", "output": "Hello.", **row}
    found = only(instructions.conversations(records(row), alpaca()))
    assert found.prompt[0].content == "### Instruction:\nSay hello.\n\n### Response:"


def test_chinese_headings():
    row = {"instruction": "翻译成英文。", "input": "你好", "output": "Hello"}
    found = only(instructions.conversations(records(row), alpaca("chinese")))
    assert found.prompt[0].content == "### 指令:\n翻译成英文。\n\n### 输入:\n你好\n\n### 回答:"
    assert found.groups == {"instruction": "翻译成英文。"}


def test_instructions_are_scored_by_the_whole_answer():
    rows = list(instructions.conversations(records({"instruction": "Add 1 and 2.", "output": "It is 3."}), alpaca()))
    answers = [" It is 3.\n", "It is 4.", "It i", ""]
    scored = list(instructions.score(rows * 4, answers, alpaca(), []))
    assert [score["exact_match"] for score in scored] == [True, False, False, False]
    assert [score["length_ratio"] for score in scored] == [1.0, 1.0, 0.5, 0.0]
    assert [round(score["rouge_l"], 3) for score in scored] == [1.0, 0.667, 0.4, 0.0]
    assert [round(score["chrf"], 3) for score in (scored[0], scored[-1])] == [1.0, 0.0]


def test_chinese_answers_have_a_rouge_score():
    rows = list(instructions.conversations(records({"instruction": "翻译", "output": "你好世界"}), alpaca("chinese")))
    assert next(instructions.score(rows, ["你好，世界"], alpaca("chinese"), []))["rouge_l"] == 1.0


def test_instructions_and_chats_are_memorised_too_and_chinese_by_its_characters():
    rows = list(instructions.conversations(records({"instruction": "翻译", "output": "你好世界"}), alpaca("chinese")))
    scored = instructions.score(rows, ["学而时习之不亦说乎"], alpaca("chinese"), iter(["子曰：学而时习之，不亦乐乎？"]))
    assert next(scored)["memorised"] == pytest.approx(7 / 9)
    rows = list(chat.conversations(records(turns(("user", "Hi"), ("assistant", "Yes?"))), CHAT))
    said = "Is there anything else I can do"
    assert next(chat.score(rows, [said], CHAT, iter([f"Bye. {said} for you?"])))["memorised"] == 1


@pytest.mark.parametrize("task", ["quotes", "instructions", "chat"])
def test_a_tasks_metric_is_loaded_by_its_path_and_gives_the_means_of_its_scores(task, tmp_path):
    module = importlib.import_module(f"stages.tasks.{task}")
    metric = evaluate.load(str(ROOT / "tools/metric.py"), task, cache_dir=str(tmp_path))
    answers, references = ["Quote: a b\nAuthor: C", "x"], ["Quote: a b\nAuthor: C", "Quote: d e\nAuthor: F"]
    found = metric.compute(predictions=answers, references=references)
    rows = [module.scores(*pair) for pair in zip(answers, references, strict=True)]
    assert found == {name: pytest.approx(sum(row[name] for row in rows) / 2) for name in rows[0]}
    answers, training = ["Quote: a b c d e\nAuthor: F", "x"], ["Quote: z b c d e\nAuthor: F"]
    found = metric.compute(predictions=answers, references=references, training=training)
    assert found["memorised"] == pytest.approx((6 / 8) / 2)
    found = metric.compute(predictions=answers, references=references, training=training, prompts=["Quote: a b", ""])
    assert found["memorised"] == 0


# chat

CHAT = chat.Options(name="chat", rows="mine.jsonl")


def turns(*pairs: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_a_conversation_of_several_turns_stays_as_it_is_and_ends_with_the_answer():
    said = [
        ("system", "Be brief."),
        ("user", "Hi  THERE"),
        ("assistant", "Yes?"),
        ("user", "Bye"),
        ("assistant", "Bye."),
    ]
    found = only(chat.conversations(records(turns(*said)), CHAT))
    assert texts(found) == said
    assert (found.reference, found.groups) == ("Bye.", {"opening": "hi there"})


def test_a_chat_answer_is_scored_by_its_words():
    rows = list(chat.conversations(records(turns(("user", "Hi"), ("assistant", "Yes?"))), CHAT))
    scored = list(chat.score(rows * 2, [" Yes?\n", "No?"], CHAT, []))
    assert [score["exact_match"] for score in scored] == [True, False]


# text_to_sql

SINGERS = "singer(singer_id, name, age)"
DDL = "CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, age INTEGER)"
SPIDER = {
    "db_id": "concert",
    "table_names_original": ["singer"],
    "column_names_original": [[-1, "*"], [0, "singer_id"], [0, "name"], [0, "age"]],
    "column_types": ["text", "number", "text", "number"],
    "primary_keys": [1],
    "foreign_keys": [],
}
ASKED = {"question": " How many singers are over 30? ", "query": "select count(*)  from singer where AGE > 30;"}


def sql(schemas: str | None = "tables.json", schema_as: str = "columns") -> text_to_sql.Options:
    columns = {"question": "question", "query": "query", "schema": "db_id"}
    return text_to_sql.Options(
        name="text_to_sql",
        rows="dev.json",
        schemas=schemas,
        columns=columns,
        schema_as=schema_as,
        instances=4,
        seed=0,
        unusable="refuse",
    )


def spider(*rows: dict, schemas: tuple = (SPIDER,)) -> dict:
    numbered = iter([Record(f"tables.json row {number}", row) for number, row in enumerate(schemas, start=1)])
    return {**records(*rows, name="dev.json"), "schemas": numbered}


def test_a_question_is_asked_under_its_schema_and_answered_in_the_normal_form():
    found = only(text_to_sql.conversations(spider({**ASKED, "db_id": "concert"}), sql()))
    assert texts(found) == [
        ("user", f"{SINGERS}\n\nHow many singers are over 30?"),
        ("assistant", "SELECT COUNT(*) FROM singer WHERE age > 30"),
    ]
    assert found.groups == {"query": "concert: select count(*) from singer where age > 30", "database": "concert"}


def test_a_row_can_bring_its_own_create_table():
    found = only(text_to_sql.conversations(records({**ASKED, "db_id": DDL}), sql(schemas=None)))
    assert found.prompt[0].content == f"{SINGERS}\n\nHow many singers are over 30?"
    assert found.groups["database"] == SINGERS
    assert next(text_to_sql.score([found], [found.reference], sql(schemas=None)))["execution_accuracy"]


def test_a_schema_can_be_shown_as_create_table():
    found = only(text_to_sql.conversations(spider({**ASKED, "db_id": "concert"}), sql(schema_as="ddl")))
    assert found.prompt[0].content.startswith("CREATE TABLE singer (singer_id NUMERIC, name TEXT, age NUMERIC")


@pytest.fixture(scope="module")
def asked() -> Conversation:
    return only(text_to_sql.conversations(spider({**ASKED, "db_id": "concert"}), sql()))


HOSTILE = [
    "DROP TABLE singer",
    "SELECT COUNT(*) FROM singer; DELETE FROM singer",
    "ATTACH DATABASE '/tmp/x' AS x",
    "SELECT load_extension('x')",
    "PRAGMA table_info(singer)",
    "SELECT * FROM sqlite_master",
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n",
    "SELECT 1\0",
    "(" * 5000,
    "'",
]


@pytest.mark.parametrize(
    ("answers", "right", "valid", "exact"),
    [
        (["SELECT COUNT(*) FROM singer WHERE age > 30"], True, True, True),
        (["select count(*) from singer where AGE>30 ;"], True, True, True),
        (["SELECT COUNT(singer_id) FROM singer WHERE NOT age <= 30"], True, True, False),
        (["SELECT COUNT(*) FROM singer WHERE age >= 30"], False, True, False),
        (["SELECT COUNT(*) FROM singer"], False, True, False),
        (["SELECT COUNT(*) FROM singers", "SELECT", "", "I do not know.", "```sql"], False, False, False),
        (HOSTILE, False, False, False),
    ],
    ids=["the same", "written otherwise", "equivalent", "off by one", "wrong", "invalid", "hostile"],
)
def test_sql_is_right_when_it_gives_what_the_reference_gives(answers, right, valid, exact, asked):
    expected = {"execution_accuracy": right, "valid_sql": valid, "exact_match": exact, "empty_results": False}
    assert list(text_to_sql.score([asked] * len(answers), answers, sql())) == [expected] * len(answers)


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("SELECT 1", "SELECT 1"),
        (" SELECT 1\nSELECT 2\n", "SELECT 1"),
        ("```sql\nSELECT a\nFROM t\n```\nIt selects a.", "SELECT a\nFROM t"),
        ("```\nSELECT 1", "SELECT 1"),
        ("```sql", ""),
        ("", ""),
    ],
)
def test_the_query_of_an_answer_is_its_fence_or_its_first_line(answer, query):
    assert text_to_sql.query(answer) == query


@pytest.mark.parametrize(
    "answer", ["SELECT 1\nSELECT 2", "```sql\nSELECT a\n```\nIt selects a.", "```\nSELECT 1", "SELECT 1"]
)
def test_an_answer_is_complete_when_its_query_can_change_no_more(answer):
    for end in range(len(answer)):
        if text_to_sql.complete(answer[:end]):
            assert text_to_sql.query(answer[:end]) == text_to_sql.query(answer)
            break
    else:
        assert "\n" not in answer or answer.count("```") == 1


def test_a_score_comes_with_what_reference_and_answer_show_where_they_differ(asked):
    answers = [asked.reference, "SELECT name FROM singer WHERE age >= 30", "SELECT salary FROM singer"]
    judged = list(text_to_sql.score_and_show([asked] * 3, answers, sql()))
    assert [scores for scores, _ in judged] == list(text_to_sql.score([asked] * 3, answers, sql()))
    right, wrong, broken = (shown for _, shown in judged)
    assert right["answer"] == right["reference"] and right["answer"]["rows"]
    assert wrong["answer"] != wrong["reference"] and wrong["answer"]["all_rows"] > 1
    assert broken["answer"] == {"error": "no such column: salary"}
    assert broken["instance"] == 0 and broken["reference"]["all_rows"] == 1


def test_a_right_answer_is_shown_where_the_reference_shows_something():
    row = {"question": "?", "query": "SELECT name FROM singer WHERE age > 30", "db_id": "concert"}
    found = only(text_to_sql.conversations(spider(row), sql()))
    ((scores, shown),) = text_to_sql.score_and_show([found], [found.reference], sql())
    assert scores["execution_accuracy"] and any(value for row in shown["reference"]["rows"] for value in row)


def test_a_hostile_answer_leaves_the_next_ones_score_as_it_is(asked):
    scores = list(text_to_sql.score([asked] * 3, ["DROP TABLE singer", asked.reference, "'"], sql()))
    assert [score["execution_accuracy"] for score in scores] == [False, True, False]


def test_a_reference_that_does_not_run_is_refused_by_its_place():
    row = {"question": "?", "query": "SELECT name FROM nowhere", "db_id": "concert"}
    with pytest.raises(Refusal, match=r"^dev.json line 1: query: SQLite says: no such table: nowhere; mend it or"):
        list(text_to_sql.conversations(spider(row), sql()))


def test_a_reference_that_the_sandbox_will_not_run_is_refused_before_anything_is_trained():
    row = {"question": "?", "query": "SELECT printf('%d', 1) FROM singer", "db_id": "concert"}
    with pytest.raises(Refusal, match=r"^dev.json line 1: query: SQLite says: not authorized to use function: printf;"):
        list(text_to_sql.conversations(spider(row), sql()))


def test_a_reference_that_the_sandbox_stops_is_refused_by_its_place():
    row = {"question": "?", "query": "SELECT a.name FROM singer a, singer b, singer c, singer d", "db_id": "concert"}
    found = list(text_to_sql.conversations(spider(row), sql()))
    with pytest.raises(Refusal, match=r"^dev.json line 1: the reference query does not run: it returns more rows"):
        list(text_to_sql.score(found, ["SELECT 1"], sql()))


# bad rows

ALPACA = {"instruction": "Add.", "output": "3"}
SAID = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes?"}
ROW = {**ASKED, "db_id": "concert"}


@pytest.mark.parametrize(
    ("task", "files", "options", "said"),
    [
        (quotes, records(EMERSON, {"quote": "x"}), QUOTES, "mine.jsonl line 2: author is missing; the row has: quote"),
        (quotes, records({**EMERSON, "quote": " "}), QUOTES, "mine.jsonl line 1: quote should not be blank"),
        (quotes, records({"text": 7}), QUOTES, "mine.jsonl line 1: text should be a valid string, it is 7"),
        (instructions, records(ALPACA, {}), alpaca(), "mine.jsonl line 2: instruction is missing; the row has:"),
        (instructions, records({**ALPACA, "output": "\n"}), alpaca(), "mine.jsonl line 1: output should not be blank"),
        (
            instructions,
            records({**ALPACA, "input": None}),
            alpaca(),
            "mine.jsonl line 1: input should be a valid string",
        ),
        (chat, records({"messages": "Hi"}), CHAT, "mine.jsonl line 1: messages should be a valid list, it is 'Hi'"),
        (chat, records({"messages": [SAID]}), CHAT, "mine.jsonl line 1: messages should have at least 2 items"),
        (
            chat,
            records(turns(("user", "Hi"), ("user", "Hi"))),
            CHAT,
            "mine.jsonl line 1: messages: the roles are user, us",
        ),
        (
            chat,
            records(turns(("user", "Hi"), ("system", "x"))),
            CHAT,
            "mine.jsonl line 1: messages: the roles are user, s",
        ),
        (
            chat,
            records(turns(("user", "Hi"), ("assistant", "Yes?"), ("user", "x"))),
            CHAT,
            "mine.jsonl line 1: messages: the roles are user, assistant, user; user and assistant must take turns",
        ),
        (
            chat,
            records(turns(("user", "Hi"), ("gpt", "x"))),
            CHAT,
            "mine.jsonl line 1: messages.1.role should be 'system', ",
        ),
        (chat, records({"messages": [SAID, {**ANSWER, "name": "x"}]}), CHAT, "mine.jsonl line 1: messages.1.name "),
        (
            chat,
            records({"messages": [SAID, {**ANSWER, "content": None}]}),
            CHAT,
            "mine.jsonl line 1: messages.1.content ",
        ),
        (
            chat,
            records(turns(("user", " "), ("assistant", "x"))),
            CHAT,
            "mine.jsonl line 1: messages.0.content is empty; ",
        ),
        (
            text_to_sql,
            spider({"question": "?", "db_id": "concert"}),
            sql(),
            "dev.json line 1: query is missing; the row",
        ),
        (text_to_sql, spider({**ROW, "query": " "}), sql(), "dev.json line 1: query should not be blank"),
        (text_to_sql, spider(ROW, {**ROW, "question": 7}), sql(), "dev.json line 2: question should be a valid string"),
        (
            text_to_sql,
            spider({**ROW, "db_id": "car"}),
            sql(),
            "dev.json line 1: db_id: car is no database of tables.json",
        ),
        (
            text_to_sql,
            spider(ROW, schemas=(SPIDER, SPIDER)),
            sql(),
            "tables.json row 2: db_id: concert is there twice; ",
        ),
        (
            text_to_sql,
            spider(ROW, schemas=({**SPIDER, "column_types": 1},)),
            sql(),
            "tables.json row 1: concert: column_",
        ),
        (text_to_sql, spider(ROW, schemas=({},)), sql(), "tables.json row 1: "),
        (
            text_to_sql,
            records({**ROW, "db_id": "SELECT 1"}),
            sql(None),
            "mine.jsonl line 1: the CREATE TABLE statements: ",
        ),
        (
            text_to_sql,
            records({**ROW, "db_id": "CREATE ("}),
            sql(None),
            "mine.jsonl line 1: the CREATE TABLE statements: ",
        ),
    ],
)
def test_a_bad_row_is_refused_by_file_line_and_field(task, files, options, said):
    with pytest.raises(Refusal) as refused:
        list(task.conversations(files, options))
    assert str(refused.value).startswith(said)


# what every task is


def test_tasks_bring_no_torch():
    imports = "; ".join(f"import stages.tasks.{name}" for name in TASKS)
    code = f"{imports}; import sys; assert not {{'torch', 'transformers', 'peft'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("task", [chat, instructions, quotes, text_to_sql])
def test_a_task_has_what_the_stages_ask_of_it(task):
    assert task.__name__.rsplit(".", 1)[-1] in TASKS
    assert task.Options.model_fields["name"].annotation.__args__ == (task.__name__.rsplit(".", 1)[-1],)
    assert all(map(callable, (task.conversations, task.score, task.Options.files)))
    assert isinstance(task.HEADLINE, str)


def test_a_new_task_is_one_new_file(tmp_path, params_file):
    import shutil

    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "stages/tasks/shout.py").write_text(
        textwrap.dedent(
            '''
            """Words in, the same in capitals out."""

            from typing import Literal

            from stages.conversation import Message, conversation
            from stages.params import Section

            HEADLINE = "exact_match"


            class Options(Section):
                name: Literal["shout"]
                marks: int

                def files(self):
                    return {"rows": "words.csv"}


            def conversations(files, options):
                for record in files["rows"]:
                    word = record.fields["word"]
                    prompt = [Message(role="user", content=word)]
                    yield conversation(record.where, prompt, word.upper() + "!" * options.marks, {"word": word})


            def score(conversations, answers, options):
                for row, answer in zip(conversations, answers, strict=True):
                    yield {"exact_match": answer == row.reference}
            '''
        )
    )
    params_file(tmp_path, task={"name": "shout", "marks": 2}, **{"prepare.group_by": "word"})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/words.csv").write_text("word\n" + "\n".join(f"word{n}" for n in range(100)) + "\n")
    command = [sys.executable, "-m", "stages.prepare", "raw", "conversations", "data.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"content": "WORD' in (tmp_path / "conversations/train.jsonl").read_text()
    params_file(tmp_path, task={"name": "shout", "marks": "two"}, **{"prepare.group_by": "word"})
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: params.yaml: task.marks is the text 'two'; it should be a whole number\n"
