"""What running a statement at the top of a module may change there, as far as the source tells."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

Kind = Literal["constant", "code", "data"]
"""What a name stands for: a value that nothing changes, a class or function, or anything else."""

Defined = ast.FunctionDef | ast.AsyncFunctionDef
Function = Defined | ast.Lambda
CONSTRUCTORS = ("__new__", "__init__", "__post_init__")
READING = frozenset(
    "abs all any ascii bool bytes callable dict enumerate filter float format frozenset getattr hasattr hash id int "
    "isinstance issubclass iter len list map max min next open print range repr reversed round set sorted str sum "
    "super tuple type zip".split()
)
"""Builtin functions that change nothing they are given."""
FRESH = READING - frozenset("enumerate filter getattr iter list map max min next reversed sorted tuple zip".split())
"""Those of them whose results hold nothing of what they are given."""


class UndecidedError(ValueError):
    """Code that may change anything.

    Attributes:
        line: where it is.
        code: what it is.
    """

    def __init__(self, line: int, code: str) -> None:
        super().__init__(f"line {line} uses {code}")
        self.line, self.code = line, code


class Changes:
    """What the statements of one module may change.

    Functions and methods of the module are looked into. Of others it is taken that they may change what they are
    given, with two exceptions: the functions in `trusted`, and methods of objects, change no class or function. What
    runs of a block leave behind (`__call__`) does not count.

    Args:
        trusted: names of the module that stand for parts of this package or of diffusers, or for classes.
    """

    def __init__(self, tree: ast.Module, trusted: Iterable[str]) -> None:
        self.trusted = frozenset(trusted)
        self.functions: dict[str, list[Function]] = {}
        self.classes: dict[str, list[ast.ClassDef]] = {}
        self.methods: dict[str, list[Function]] = {}
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        methods = [part for node in classes for part in node.body if isinstance(part, Defined)]
        for node in classes:
            self.classes.setdefault(node.name, []).append(node)
        for method in methods:
            self.methods.setdefault(method.name, []).append(method)
        for part in ast.walk(tree):
            if isinstance(part, Defined) and part not in methods:
                self.functions.setdefault(part.name, []).append(part)
            elif isinstance(part, ast.Assign) and isinstance(part.value, ast.Lambda):
                for name in _names(part.targets, ast.Store):
                    self.functions.setdefault(name, []).append(part.value)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        self.imported = frozenset(
            (alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names
        )
        self._looked_into: set[tuple[Function, frozenset[tuple[str, Kind]]]] = set()

    def changes(self, node: ast.stmt, watched: Mapping[str, Kind]) -> bool:
        """Whether running a statement may change what the names in `watched` stand for, but by binding them anew.

        Raises:
            UndecidedError: it runs code that the source does not tell.
        """
        self._looked_into.clear()
        return self._any(list(_run(node)), dict(watched))

    def aliases(self, node: ast.stmt, watched: Mapping[str, Kind]) -> dict[str, Kind]:
        """Further names that a statement binds to what those in `watched` stand for, or to parts of it."""
        return self._aliases(list(_run(node)), watched)

    def _any(self, nodes: list[ast.AST], watched: dict[str, Kind]) -> bool:
        watched |= self._aliases(nodes, watched)
        return any(self._changes(node, watched) for node in nodes)

    def _changes(self, node: ast.AST, watched: Mapping[str, Kind]) -> bool:
        _require_decided(node)
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            return bool(self._given([node.value], watched))
        if isinstance(node, ast.AugAssign):  # of a name inside a list or table, say
            return "data" in self._given([node.target], watched)
        if isinstance(node, ast.Call):
            return self._call_changes(node, watched)
        if isinstance(node, ast.ClassDef):
            inherited = [part for base in node.bases for part in self._inherited(base, "__init_subclass__")]
            return self._bodies_change(inherited, watched, ["code"])
        if isinstance(node, ast.Attribute):  # a property, or a method that is handed on
            return self._bodies_change(self.methods.get(node.attr, []), watched, [])
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):  # a function that is handed on
            return self._bodies_change(self._called(node), watched, [])
        return False

    def _call_changes(self, call: ast.Call, watched: Mapping[str, Kind]) -> bool:
        given = self._given([*call.args, *(keyword.value for keyword in call.keywords)], watched)
        called = call.func
        if isinstance(called, ast.Name):
            if called.id in self.functions or called.id in self.classes:
                return self._bodies_change(self._called(called), watched, given)
            if called.id in READING and called.id not in watched:
                return False
            if called.id in self.trusted:
                return "data" in given
            return bool(given) or watched.get(called.id, "constant") != "constant"
        if not isinstance(called, ast.Attribute):
            return bool(given or self._given([called], watched))
        if self._given([called.value], watched):
            return True
        if self._bodies_change(self.methods.get(called.attr, []), watched, given):
            return True
        if isinstance(called.value, ast.Call) and getattr(called.value.func, "id", "") == "super":
            return False
        root = _root(called)
        return bool(given) if root in self.imported - self.trusted else "data" in given

    def _bodies_change(self, functions: Iterable[Function], watched: Mapping[str, Kind], given: list[Kind]) -> bool:
        return any(self._body_changes(function, watched, given) for function in functions)

    def _body_changes(self, function: Function, watched: Mapping[str, Kind], given: list[Kind]) -> bool:
        """Whether a call changes what is watched, or what it is given: of that it may be any parameter."""
        body = function.body if isinstance(function.body, list) else [function.body]
        nodes = [inner for part in body for inner in ast.walk(part)]
        declared = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
        if declared & watched.keys() & set(_names(body, ast.Store)):
            return True
        parameters = [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]
        own = {*parameters, *_names(body, ast.Store)} - declared
        inside: dict[str, Kind] = {name: kind for name, kind in watched.items() if name not in own}
        if given:
            kind: Kind = "data" if "data" in given else "code"
            inside |= {name: kind for name in parameters if name != "self"}
        key = (function, frozenset(inside.items()))
        if key in self._looked_into:
            return False
        self._looked_into.add(key)
        return self._any(nodes, inside)

    def _called(self, name: ast.Name) -> list[Function]:
        """The functions of this module that a call of a name runs."""
        constructors = (self._inherited(name, method) for method in CONSTRUCTORS)
        return [*self.functions.get(name.id, []), *itertools.chain.from_iterable(constructors)]

    def _inherited(self, base: ast.expr, method: str) -> list[Function]:
        """The methods of this name in a class of this module, and in those of its bases that are."""
        found: list[Function] = []
        waiting, seen = [base], set()
        while waiting:
            name = getattr(waiting.pop(), "id", "")
            for part in self.classes.get(name, []) if name not in seen else []:
                found += [f for f in part.body if isinstance(f, Defined) and f.name == method]
                waiting += part.bases
            seen.add(name)
        return found

    def _aliases(self, nodes: list[ast.AST], watched: Mapping[str, Kind]) -> dict[str, Kind]:
        found: dict[str, Kind] = {}
        for node in nodes:
            for targets, value in _bindings(node):
                names = [name for target in targets for name in _held_by(target) if name not in watched]
                known = {**watched, **found} if names else {}
                held = self._given(_held_in(value), known)
                kinds = self._given([value], known)
                if _is_kept_inside(node, value):  # what holds a class or function is none itself
                    kinds = [kind for kind in kinds if kind == "data"]
                if kinds or "data" in held:
                    found |= dict.fromkeys(names, "data" if "data" in {*kinds, *held} else "code")
        return found

    def _given(self, values: Iterable[ast.expr], watched: Mapping[str, Kind]) -> list[Kind]:
        """The kinds of what is watched, constants apart, that expressions give or hold."""
        names = {name for value in values for name in self._sources(value)} & watched.keys()
        return sorted({watched[name] for name in names} - {"constant"})

    def _sources(self, value: ast.expr) -> Iterator[str]:
        """The names whose object, or a part of it, an expression may give."""
        match value:
            case ast.Name():
                yield value.id
            case ast.Attribute() | ast.Subscript() | ast.Starred() | ast.NamedExpr() | ast.Await():
                yield from self._sources(value.value)
            case ast.IfExp():
                yield from self._all_sources([value.body, value.orelse])
            case ast.BoolOp():
                yield from self._all_sources(value.values)
            case ast.Tuple() | ast.List() | ast.Set():
                yield from self._all_sources(value.elts)
            case ast.Dict():
                yield from self._all_sources(value.values)
            case ast.Call():
                yield from self._sources_of_call(value)

    def _all_sources(self, values: Iterable[ast.expr]) -> Iterator[str]:
        for value in values:
            yield from self._sources(value)

    def _sources_of_call(self, call: ast.Call) -> Iterator[str]:
        if isinstance(call.func, ast.Attribute):
            yield from self._sources(call.func.value)
        elif isinstance(call.func, ast.Name):
            functions = self.functions.get(call.func.id, [])
            if functions or call.func.id in READING - FRESH or call.func.id == "vars":
                yield from self._all_sources(call.args)
            for function in functions:
                for node in ast.walk(function):
                    if isinstance(node, ast.Return) and node.value is not None:
                        yield _root(node.value)


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """What runs with a statement: of functions that it defines their decorators and defaults only."""
    if isinstance(node, Defined):
        inner: list[ast.AST] = [*_decorating(node), node.args]
    elif isinstance(node, ast.ClassDef):
        inner = [*_decorating(node), *node.bases, *node.keywords, *node.body]
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        inner = [*node.targets, node.value.args]
    else:
        inner = list(ast.iter_child_nodes(node))
    yield node
    for part in inner:
        yield from _run(part)


def _decorating(node: Defined | ast.ClassDef) -> list[ast.expr]:
    """The calls of decorators; what they are given is new."""
    return [ast.copy_location(ast.Call(decorator, [], []), decorator) for decorator in node.decorator_list]


def _bindings(node: ast.AST) -> Iterator[tuple[list[ast.expr], ast.expr]]:
    """The targets of a statement or comprehension, and what is bound to them."""
    if isinstance(node, ast.Assign):
        yield node.targets, node.value
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield [node.target], node.value
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        yield [node.target], node.iter
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield [node.optional_vars], node.context_expr


def _is_kept_inside(node: ast.AST, value: ast.expr) -> bool:
    """Whether a statement puts a value into an object, or into a new container."""
    if not isinstance(node, ast.Assign) or isinstance(node.targets[0], ast.Tuple | ast.List):
        return False
    inside = isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    return inside or isinstance(value, ast.Tuple | ast.List | ast.Set | ast.Dict)


def _held_by(target: ast.expr) -> Iterator[str]:
    """The names under which a value is found that is bound to a target; what an object keeps is looked for outside."""
    yield from _names([target], ast.Store)
    if isinstance(target, ast.Attribute | ast.Subscript) and _root(target) != "self":
        yield _root(target)


def _held_in(value: ast.expr) -> list[ast.expr]:
    """What a new object was given that may hold it."""
    if not isinstance(value, ast.Call) or (isinstance(value.func, ast.Name) and value.func.id in FRESH):
        return []
    return [*value.args, *(keyword.value for keyword in value.keywords)]


def _names(nodes: Iterable[ast.AST], context: type[ast.expr_context]) -> Iterator[str]:
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, context):
                yield part.id


def _root(value: ast.expr) -> str:
    while isinstance(value, ast.Attribute | ast.Subscript):
        value = value.value
    return value.id if isinstance(value, ast.Name) else ""


def _require_decided(node: ast.AST) -> None:
    name = ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        namespace = node.func.id in ("vars", "locals") and not node.args
        name = f"{node.func.id}()" if namespace or node.func.id in ("exec", "eval", "globals") else ""
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name) and node.slice.id == "__name__":
        name = ast.unparse(node)
    if name:
        raise UndecidedError(getattr(node, "lineno", 0), name)
