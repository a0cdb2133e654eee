"""How hard a query is to write, in Spider's four classes: easy, medium, hard, extra.

The classes are those of Spider's own evaluation (Yu et al. 2018, https://github.com/taoyds/spider, eval_hardness),
counted on sqlglot's tree instead of Spider's.
"""

from sqlglot import exp

from stages.sql.normal import parsed

CLASSES = ("easy", "medium", "hard", "extra")


def difficulty(query: str) -> str:
    """One of CLASSES; `extra` where sqlglot cannot read the query."""
    tree = parsed(query)
    if not isinstance(tree, exp.Query):
        return "extra"
    nested = len(list(tree.find_all(exp.Select))) - 1
    select = tree.find(exp.Select)  # the outermost, or the first of a set operation
    own = list(select.walk(prune=lambda n: n is not select and isinstance(n, exp.Query)))
    clauses = _clauses(tree, select, own)
    others = _others(select, own)
    if not nested and not others and clauses <= 1:
        return "easy"
    if not nested and ((others <= 2 and clauses <= 1) or (others < 2 and clauses <= 2)):
        return "medium"
    if not nested and ((others > 2 and clauses <= 2) or (others <= 2 and clauses == 3)):
        return "hard"
    if nested == 1 and not others and clauses <= 1:
        return "hard"
    return "extra"


def _clauses(tree: exp.Query, select: exp.Select, own: list[exp.Expression]) -> int:
    """WHERE, GROUP BY, ORDER BY, LIMIT, each table joined, each OR, each LIKE."""
    count = sum(bool(select.args.get(name)) for name in ("where", "group"))
    count += sum(bool(tree.args.get(name) or select.args.get(name)) for name in ("order", "limit"))
    count += len(select.args.get("joins") or [])
    return count + sum(isinstance(node, (exp.Or, exp.Like)) for node in own)


def _others(select: exp.Select, own: list[exp.Expression]) -> int:
    """More than one of: aggregates, columns shown, conditions, columns grouped by."""
    where = select.args.get("where")
    conditions = [
        node
        for node in (where.walk(prune=lambda n: isinstance(n, exp.Query)) if where else ())
        if isinstance(node, (exp.Predicate, exp.In, exp.Between)) and not isinstance(node, exp.Connector)
    ]
    group = select.args.get("group")
    counts = (
        sum(isinstance(node, exp.AggFunc) for node in own),
        len(select.expressions),
        len(conditions),
        len(group.expressions) if group else 0,
    )
    return sum(count > 1 for count in counts)
