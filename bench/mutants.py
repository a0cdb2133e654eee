"""A gold query in; the queries that a model nearly wrote instead out: one small change each, by kind."""

from collections.abc import Iterator

from sqlglot import exp

from stages.sql.normal import parsed

COMPARISONS = {
    exp.GT: (exp.GTE, exp.LT),
    exp.GTE: (exp.GT, exp.LTE),
    exp.LT: (exp.LTE, exp.GT),
    exp.LTE: (exp.LT, exp.GTE),
    exp.EQ: (exp.NEQ,),
    exp.NEQ: (exp.EQ,),
}
AGGREGATES = {exp.Min: (exp.Max,), exp.Max: (exp.Min,), exp.Sum: (exp.Avg,), exp.Avg: (exp.Sum,), exp.Count: ()}
SETS = {exp.Union: exp.Intersect, exp.Intersect: exp.Union, exp.Except: exp.Intersect}


def mutants(query: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each mutant, every text once; none where sqlglot cannot read the query."""
    tree = parsed(query)
    seen = {query}
    if not isinstance(tree, exp.Query):
        return
    seen.add(tree.sql("sqlite"))
    for kind, mutant in _all(tree):
        text = mutant.sql("sqlite")
        if text not in seen:
            seen.add(text)
            yield kind, text


def _all(tree: exp.Query) -> Iterator[tuple[str, exp.Expression]]:
    nodes = list(tree.walk())
    for number, node in enumerate(nodes):
        for kind, change in _changes(node):
            copy = tree.copy()
            twin = list(copy.walk())[number]
            changed = change(twin)
            if twin is copy and changed is not None:
                copy = changed
            elif changed is not None:
                twin.replace(changed)
            yield kind, copy


def _changes(node: exp.Expression) -> Iterator[tuple[str, object]]:
    """Kinds of change and, for each, a function that changes the node in place or returns what replaces it."""
    if isinstance(node, (exp.Where, exp.Having)):
        yield "predicate", lambda n: n.pop() and None
    if isinstance(node, (exp.And, exp.Or)) and node.find_ancestor(exp.Where, exp.Having):
        yield "predicate", lambda n: n.this.copy()
        yield "predicate", lambda n: n.expression.copy()
        other = exp.Or if isinstance(node, exp.And) else exp.And
        yield "connective", lambda n: other(this=n.this.copy(), expression=n.expression.copy())
    for new in COMPARISONS.get(type(node), ()):
        if node.find_ancestor(exp.Where, exp.Having):
            yield "comparison", lambda n, new=new: new(this=n.this.copy(), expression=n.expression.copy())
    if isinstance(node, (exp.Like, exp.In)) and not isinstance(node.parent, exp.Not):
        yield "comparison", lambda n: exp.Not(this=n.copy())
    for new in AGGREGATES.get(type(node), ()):
        yield "aggregate", lambda n, new=new: new(this=n.this.copy())
    if isinstance(node, exp.Count) and not isinstance(node.this, (exp.Star, exp.Distinct)):
        yield "distinct", lambda n: exp.Count(this=exp.Distinct(expressions=[n.this.copy()]))
    if isinstance(node, exp.Count) and isinstance(node.this, exp.Distinct):
        yield "distinct", lambda n: exp.Count(this=n.this.expressions[0].copy())
    if isinstance(node, exp.Select):
        if node.args.get("distinct"):
            yield "distinct", lambda n: n.set("distinct", None)
        else:
            yield "distinct", lambda n: n.set("distinct", exp.Distinct())
        if node.args.get("group"):
            yield "group", lambda n: n.set("group", None)
    if isinstance(node, exp.Join) and not node.args.get("side") and node.args.get("on"):
        yield "join", lambda n: n.set("side", "LEFT")
        yield "join", lambda n: n.set("on", None)
    if isinstance(node, exp.Limit):
        yield "limit", lambda n: n.pop() and None
        if isinstance(node.expression, exp.Literal):
            yield "limit", lambda n: n.set("expression", exp.Literal.number(int(n.expression.this) + 1))
    if isinstance(node, exp.Ordered):
        yield "order", lambda n: n.set("desc", not n.args.get("desc")) or n.set("nulls_first", not n.args.get("desc"))
    if isinstance(node, exp.Order):
        yield "order", lambda n: n.pop() and None
    if type(node) in SETS:
        yield "set", lambda n: SETS[type(n)](this=n.this.copy(), expression=n.expression.copy(), distinct=True)
    if isinstance(node, exp.Literal) and node.is_int and isinstance(node.parent, tuple(COMPARISONS)):
        yield "literal", lambda n: exp.Literal.number(int(n.this) + 1)
