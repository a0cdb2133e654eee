"""One file a task, named in params.yaml as task.name. A task is pure: rows in, conversations and scores out.

It defines

- `Options`, a Section with the task's parameters, whose `files()` names the files of data/raw that it reads;
- `conversations(files, options)`, which yields a Conversation for each row it keeps, and raises Refusal for a bad one,
  or yields the Refusal where the row is to be left out and counted;
- `score(conversations, answers, options)`, which yields for each answer a dict of scores, numbers between 0 and 1 or
  truth values, under the names that stand in metrics/base.json and metrics/tuned.json;
- `HEADLINE`, the name of the score that decides;

and may define

- `unscorable(conversations, options)`, which yields of the test rows those that no answer can be scored against, each
  with the Refusal that says why, or raises it; going through the conversations reads them from their file each time;
- `score_and_show(conversations, answers, options)`, which yields for each answer its scores and a JSON value that shows
  a person why they are what they are; it stands in data/answers as `shown`.

With `TRAINING = True`, `score` is given a fourth argument, the training rows' answers, to tell what was copied.

Training and scoring stand in one file so that they cannot disagree about what an answer is.
"""
