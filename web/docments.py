"""What code says about itself, read from its source: signatures, the comment beside each argument,
and the sentences with which it refuses.
"""
import ast
import io
import tokenize
from dataclasses import dataclass, field


@dataclass
class Argument:
    "One argument of a function, or one field of a class."
    name: str
    kind: str = ""       # its annotation
    default: str = ""
    said: str = ""       # the comment beside it


@dataclass
class Entry:
    "A public name."
    name: str
    doc: str = ""
    signature: str = ""
    arguments: list = field(default_factory=list)
    returns: str = ""            # type and comment
    refusals: list = field(default_factory=list)   # (error, sentence)
    methods: list = field(default_factory=list)    # entries
    value: str = ""              # of a constant


def comments(source):
    "Line -> comment. A line that is nothing but a comment continues the one above."
    found, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT: continue
        line, text = token.start[0], token.string.lstrip("# ")
        found[line] = text
        if not token.line[:token.start[1]].strip(): alone.add(line)
    for line in sorted(alone, reverse=True):
        if line - 1 in found: found[line - 1] += " " + found.pop(line)
    return found


def text(node):
    "Code as written, in one line."
    return "" if node is None else ast.unparse(node)


def arguments(node, beside):
    "The arguments of a function: a comment belongs to all that stand on its line."
    a = node.args
    plain = a.posonlyargs + a.args
    pairs = list(zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults))
    pairs += list(zip(a.kwonlyargs, a.kw_defaults))
    named = [(p.arg, p, d) for p, d in pairs if p.arg not in ("self", "cls")]
    named += [(stars + p.arg, p, None) for stars, p in (("*", a.vararg), ("**", a.kwarg)) if p]
    first = node.body[0].lineno
    return [Argument(name, text(p.annotation), text(d),
                     beside.get(p.end_lineno, "") if p.end_lineno < first else "")
            for name, p, d in named]


def signature(node, name):
    "A call, with defaults and without types."
    bare = ast.parse(ast.unparse(node)).body[0]
    a = bare.args
    for p in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]:
        p.annotation = None
    a.posonlyargs, a.args = ([p for p in ps if p.arg not in ("self", "cls")]
                             for ps in (a.posonlyargs, a.args))
    return f"{name}({ast.unparse(a)})"


def returns(node, beside):
    "What a function gives back: its type and the comment after it."
    if not node.returns: return ""
    said = beside.get(node.returns.end_lineno, "")
    return f"`{text(node.returns)}`" + (f" – {said}" if said else "")


def words(node):
    "The text of a message; what is known only later is an ellipsis."
    if isinstance(node, ast.Constant) and isinstance(node.value, str): return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp): return words(node.left) + words(node.right)
    if isinstance(node, ast.IfExp): return f"{words(node.body)} / {words(node.orelse)}"
    return ""


def refused(node):
    "Errors and sentences of one function's own body."
    for n in ast.walk(node):
        if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and n.exc.args:
            yield text(n.exc.func), words(n.exc.args[0])
        if isinstance(n, ast.Call) and text(n.func) == "require" and len(n.args) > 1:
            kind = text(n.args[2]) if len(n.args) > 2 else "ValueError"
            yield kind, words(n.args[1])


def refusals(node, helpers):
    "Those of a function, and of the checks that it calls."
    names = [text(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
    checks = [helpers[n] for n in dict.fromkeys(names) if n.startswith("check_") and n in helpers]
    found = [pair for f in [node, *checks] for pair in refused(f)]
    return [pair for pair in dict.fromkeys(found) if pair[1].strip(" …")]


def function(node, beside, helpers, name=""):
    "A function, or a method."
    return Entry(name or node.name, ast.get_docstring(node) or "",
                 signature(node, name or node.name), arguments(node, beside),
                 returns(node, beside), refusals(node, helpers))


def fields(node, beside):
    "The fields of a dataclass or of a named tuple."
    return [Argument(n.target.id, text(n.annotation), text(n.value),
                     beside.get(n.end_lineno, "") or beside.get(n.lineno - 1, ""))
            for n in node.body if isinstance(n, ast.AnnAssign)]


def class_(node, beside, helpers):
    "A class: how it is made, and its public methods."
    own = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    made = next((f for f in own if f.name == "__init__"), None)
    entry = Entry(node.name, ast.get_docstring(node) or "")
    if made:
        first = function(made, beside, helpers, node.name)
        entry.arguments, entry.refusals = first.arguments, first.refusals
        entry.signature = first.signature
    else:
        entry.arguments = fields(node, beside)
        inside = ", ".join(f"{f.name}={f.default}" if f.default else f.name
                           for f in entry.arguments)
        entry.signature = f"{node.name}({inside})" if inside else node.name
        after = next((f for f in own if f.name == "__post_init__"), None)
        if after: entry.refusals = refusals(after, helpers)
    entry.methods = [function(f, beside, helpers, f"{node.name}.{f.name}") for f in own
                     if not f.name.startswith("_")]
    return entry


def entries(source, public):
    "The public names of a module, in the order in which they are defined."
    tree, beside = ast.parse(source), comments(source)
    helpers = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in public:
            yield function(node, beside, helpers)
        if isinstance(node, ast.ClassDef) and node.name in public:
            yield class_(node, beside, helpers)
        if isinstance(node, ast.Assign) and text(node.targets[0]) in public:
            said = beside.get(node.end_lineno, "") or beside.get(node.lineno - 1, "")
            yield Entry(text(node.targets[0]), said, value=text(node.value))
