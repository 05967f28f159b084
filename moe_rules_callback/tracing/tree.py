"""A traced function as a tree of modules, scopes, calls and primitives.

    >>> print(trace(model.apply, params, x))
    trace apply  f32[10,5], f32[10], f32[4,5] -> f32[4,10]
      module_call Dense_0  type=Dense features=10
        dot_general  f32[4,5], f32[5,10] params/Dense_0/kernel -> f32[4,10]
      jit relu  f32[4,10] -> f32[4,10]

`trace(..)(params, x)` runs it again, under jit and grad too. `xml()` is the same tree as text, over which
`find` asks by XPath.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any
from xml.etree import ElementTree

from jax.extend.core import Jaxpr, JaxprEqn

from .arguments import Arguments
from .evaluate import Evaluator, run_group
from .flow import Flow, Value
from .modules import as_text, call_in_scope, marked_modules
from .program import Program, name_of
from .walk import Path, Site, bodies, boundary, dtype_of, shape_of, source_of, tag


class Node:
    """A module, a scope, a call or a primitive.

    Calling it runs what stands there: `node(*inputs)`, with `inputs` as listed.

    Attributes:
        tag: `module_call`, `scope`, or the name of the primitive: `jit`, `scan`, `top_k`.
        attributes: name, type, path, source, and the settings of the module or parameters of the primitive.
        inputs: of each value read its type and, where one goes in unchanged, the argument's key path.
        outputs: type of each result.
        children: what is inside, in order.
        types: shape and dtype of each result.
        site: where it stands.
    """

    def __init__(
        self,
        tag: str,
        attributes: dict[str, str],
        children: list[Node],
        site: Site,
        jaxpr: Jaxpr,
        flow: Flow,
        names: Sequence[str],
    ) -> None:
        self.tag, self.attributes, self.children, self.site = tag, attributes, children, site
        self._jaxpr, self._start = jaxpr, site.path[-1]
        reads, results = boundary(jaxpr, self._start, site.count)
        self.inputs = [(_type(atom), _parameter(atom, site.path, flow, names)) for atom in reads]
        self.outputs = [_type(var) for var in results]
        self.types = [(shape_of(var), dtype_of(var)) for var in results]

    def __call__(self, *inputs: Any) -> Any:
        outs = run_group(self._jaxpr, self._start, self.site.count, inputs)
        return outs[0] if len(outs) == 1 else outs

    def __repr__(self) -> str:
        return _line(self)

    def element(self, nodes: dict[int, Node], keep: list[ElementTree.Element]) -> ElementTree.Element:
        """The node as XML; `nodes` learns which element is which node."""
        made = ElementTree.Element(self.tag, self.attributes)
        for kind, parameter in self.inputs:
            extra = {"parameter": parameter} if parameter else {}
            ElementTree.SubElement(made, "input", {"type": kind, **extra})
        made.extend([child.element(nodes, keep) for child in self.children])
        for kind in self.outputs:
            ElementTree.SubElement(made, "output", {"type": kind})
        nodes[id(made)] = self
        keep.append(made)
        return made


class Trace:
    """What `trace` returns: call it like the function, print it, ask it."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result on other arguments of the same structure, shapes and dtypes.

        Raises:
            TracingError: the arguments are not like those of the trace.
        """
        arguments = Arguments(self.program.fn, args, kwargs)
        self.program.same(arguments)
        return self.program.run(Evaluator(), arguments)[0]

    @cached_property
    def nodes(self) -> list[Node]:
        """The outermost nodes, in order."""
        return _nodes(self.program.closed.jaxpr, (), Flow(self.program.closed), self.program.names)

    def tree(self) -> tuple[ElementTree.Element, dict[int, Node]]:
        """(root element, id of each element -> its node)."""
        return self._tree[:2]

    @cached_property
    def _tree(self) -> tuple[ElementTree.Element, dict[int, Node], list[ElementTree.Element]]:
        nodes: dict[int, Node] = {}
        keep: list[ElementTree.Element] = []  # so that no id is used twice
        root = ElementTree.Element("trace", {"name": name_of(self.program.fn)})
        root.extend([node.element(nodes, keep) for node in self.nodes])
        return root, nodes, keep

    def xml(self) -> str:
        """The tree as indented XML."""
        copy = ElementTree.fromstring(ElementTree.tostring(self._tree[0]))
        ElementTree.indent(copy)
        return ElementTree.tostring(copy, encoding="unicode")

    def __str__(self) -> str:
        jaxpr = self.program.closed.jaxpr
        ins, outs = (", ".join(map(_type, atoms)) for atoms in (jaxpr.invars, jaxpr.outvars))
        return "\n".join([f"trace {name_of(self.program.fn)}  {ins} -> {outs}", *_lines(self.nodes, 1)])


def trace(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Trace:
    """Traces a function without running it.

    Args:
        fn: any function of arrays and pytrees of them; Linen's and NNX's modules in it show as `module_call`.
        *args, **kwargs: its arguments; `jax.ShapeDtypeStruct` in the place of arrays will do.
    """
    with marked_modules():
        return Trace(Program.of(fn, Arguments(fn, args, kwargs)))


def _nodes(jaxpr: Jaxpr, frame: Path, flow: Flow, names: Sequence[str]) -> list[Node]:
    """One node per equation, under nodes for the scopes that they were traced in."""

    def leaf(i: int, eqn: JaxprEqn) -> Node:
        path = (*frame, i)
        inside = [n for j, b in enumerate(bodies(eqn)) for n in _nodes(b.jaxpr, (*path, j), flow, names)]
        return Node(_xml_name(tag(eqn)), _attributes(eqn), inside, Site(path), jaxpr, flow, names)

    def under(numbered: list[tuple[int, JaxprEqn]], depth: int) -> Iterator[Node]:
        for scope, group in groupby(numbered, key=lambda pair: _scope_at(pair[1], depth)):
            members = list(group)
            if scope is None:
                yield from (leaf(i, eqn) for i, eqn in members)
                continue
            children = list(under(members, depth + 1))
            label, attributes = _scope_attributes(scope)
            if label == "scope" and all(_is_named(child, scope) for child in children):
                yield from children  # Linen's own scope around a module's call
                continue
            site = Site((*frame, members[0][0]), len(members))
            yield Node(label, attributes, children, site, jaxpr, flow, names)

    return list(under(list(enumerate(jaxpr.eqns)), 0))


def _scope_at(eqn: JaxprEqn, depth: int) -> str | None:
    stack = eqn.source_info.name_stack.stack
    return stack[depth].name if depth < len(stack) else None


def _scope_attributes(scope: str) -> tuple[str, dict[str, str]]:
    call = call_in_scope(scope)
    if call is None:
        return "scope", {"name": scope}
    attributes = {_xml_name(k): v for k, v in call.attributes.items()}
    own = {"name": call.path[-1] if call.path else call.type, "type": call.type, "path": "/".join(call.path)}
    return "module_call", attributes | own | ({"method": call.method} if call.method != "__call__" else {})


def _is_named(node: Node, scope: str) -> bool:
    """Whether a node is the call of the module after which a scope is named."""
    own = (node.attributes.get("name"), node.attributes.get("type"))
    return node.tag == "module_call" and scope.partition(".")[0] in own


def _attributes(eqn: JaxprEqn) -> dict[str, str]:
    params = {_xml_name(k): text for k, v in eqn.params.items() if (text := as_text(v)) not in (None, "None")}
    return {**{k: v for k, v in params.items() if v is not None}, "source": source_of(eqn)}


def _xml_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _type(atom: Any) -> str:
    aval = atom.aval
    return aval.str_short(short_dtypes=True) if hasattr(aval, "str_short") else str(aval)


def _parameter(atom: Any, path: Path, flow: Flow, names: Sequence[str]) -> str:
    """Key path of the argument that this value is, or ''."""
    if hasattr(atom, "val"):
        return ""
    value = flow.origin(Value(path[:-1], atom))
    return names[flow.inputs[value]] if value in flow.inputs else ""


def _line(node: Node) -> str:
    shown = {k: v for k, v in node.attributes.items() if k not in ("name", "source", "path")}
    if node.tag != "module_call":
        shown = {k: v for k, v in shown.items() if k in ("k", "length", "axes", "features", "dimension")}
    name = node.attributes.get("name", "")
    settings = " ".join(f"{k}={v}" for k, v in shown.items() if v != "None")
    reads = ", ".join(f"{kind} {parameter}".strip() for kind, parameter in node.inputs)
    types = f"{reads} -> {', '.join(node.outputs)}"
    return "  ".join(part for part in (f"{node.tag} {name}".strip(), settings, types) if part)


def _lines(nodes: list[Node], depth: int) -> Iterator[str]:
    for node in nodes:
        yield "  " * depth + _line(node)
        yield from _lines(node.children, depth + 1)
