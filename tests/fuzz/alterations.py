"""Alterations of sound files, drawn by hypothesis: of bytes, of text, of trees of values."""

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

DRAW = Callable[[Any], Any]
Path_ = tuple[Any, ...]
_KEY, _RAW = "fuzz-key", "fuzz-value"
_DEEP = functools.reduce(lambda value, _: [value], range(50), 0)
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 2**31, 2**63, -(2**63), 10**40, 10**400),
    *(1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "0", "nan", "\0", "\x1b[2J", "\ud800", "a" * 5000, "..", "../elsewhere"),
    *("/etc/passwd", "~", "a/../../b", "auto", [], {}, [[]], [None], {"": 0}, {"x": []}, _DEEP),
    *([0] * 1000, ["../elsewhere"]),
]
_RAW_YAML = [
    *("!!python/object/apply:os.getcwd []", "!!int x", "2001-99-99", "2001-01-01", "0x1F", "1_000"),
    *("!!binary x", "!!set {a, b}", "*missing", "&a [*a]", "1:30", "yes", "~", ".inf", "!x y"),
    *("{[1]: 2}", "!!timestamp x", "{? {a: 1} : 2}", "!!float '1,5'", "<<", "{<<: 1}", "1e3"),
]


@dataclass(frozen=True)
class Altered:
    """An altered file: its bytes, what was done, and whether bytes or values were altered."""

    data: bytes
    about: str
    of_bytes: bool

    def __repr__(self) -> str:
        return self.about


def altered(form: str, sound: bytes) -> st.SearchStrategy[Altered]:
    """Alterations of a file of a form."""
    values = {
        "json": _of_json,
        "jsonl": _of_json_lines,
        "yaml": _of_yaml,
        "text": _of_text,
        "torch": _of_torch,
    }
    of_bytes = _drawn(lambda draw: _Bytes(sound, draw).result)
    if form not in values:
        return of_bytes
    of_values = _drawn(functools.partial(values[form], sound))
    return st.one_of(of_bytes, of_values, of_values)


@st.composite
def _drawn(draw: DRAW, make: Callable[[DRAW], Altered]) -> Altered:
    return make(draw)


class _Bytes:
    """One alteration of bytes."""

    def __init__(self, sound: bytes, draw: DRAW) -> None:
        kinds = ("flip", "set", "cut", "grow", "remove", "insert", "swap", "zeros", "encoding")
        self._sound, self._draw = sound, draw
        kind = self._draw(st.sampled_from(kinds))
        about, content = getattr(self, f"_{kind}")()
        self.result = Altered(content, about, of_bytes=True)

    def _place(self) -> int:
        last = max(len(self._sound) - 1, 0)
        head = st.integers(0, min(last, 200))
        return self._draw(st.one_of(head, st.integers(0, last), head.map(lambda n: last - n)))

    def _flip(self):
        at, bit = self._place(), self._draw(st.integers(0, 7))
        data = bytearray(self._sound)
        data[at] ^= 1 << bit
        return f"bit {bit} of byte {at} flipped", bytes(data)

    def _set(self):
        at, new = self._place(), self._draw(st.binary(min_size=1, max_size=8))
        return f"bytes from {at} set to {new!r}", self._with(at, at + len(new), new)

    def _cut(self):
        at = self._place()
        return f"cut at {at}", self._sound[:at]

    def _grow(self):
        more = self._draw(st.sampled_from((b"\0", b"\n", b"x", b"\xff", bytes(4096), b"\n{}\n")))
        return f"followed by {more[:8]!r} ({len(more)} bytes)", self._sound + more

    def _remove(self):
        at, count = self._place(), self._draw(st.integers(1, 64))
        return f"{count} bytes from {at} removed", self._with(at, at + count, b"")

    def _insert(self):
        at, new = self._place(), self._draw(st.binary(min_size=1, max_size=8))
        return f"{new!r} inserted at {at}", self._with(at, at, new)

    def _swap(self):
        a, b = sorted((self._place(), self._place()))
        parts = self._sound[b:], self._sound[a:b], self._sound[:a]
        return f"parts before {a} and after {b} swapped", b"".join(parts)

    def _zeros(self):
        at, count = self._place(), self._draw(st.sampled_from((1, 8, 512, 4096, 1 << 20)))
        count = min(count, len(self._sound) - at)
        return f"{count} zeros from {at}", self._with(at, at + count, bytes(count))

    def _encoding(self):
        name = self._draw(st.sampled_from(("utf-16", "utf-8-sig", "utf-32", "utf-7")))
        return f"text in {name}", self._sound.decode("latin-1").encode(name)

    def _with(self, begin: int, end: int, new: bytes) -> bytes:
        return self._sound[:begin] + new + self._sound[end:]


def any_value(draw: DRAW) -> Any:
    """A value of another type, or at its limits."""
    return draw(
        st.one_of(
            st.sampled_from(VALUES), st.sampled_from(VALUES), st.integers(), st.floats(), st.text()
        )
    )


def _of_json(sound: bytes, draw: DRAW) -> Altered:
    about, text = _json_text(json.loads(sound), draw)
    return Altered(text, about, of_bytes=False)


def _json_text(tree: Any, draw: DRAW) -> tuple[str, bytes]:
    about, tree, key = alter_tree(tree, draw, value=any_value)
    text = json.dumps(tree)
    if key is not None:
        text = text.replace(json.dumps(_KEY), json.dumps(key))
    return about, text.encode()


def _of_json_lines(sound: bytes, draw: DRAW) -> Altered:
    lines = sound.rstrip(b"\n").split(b"\n")
    at = draw(st.integers(0, len(lines) - 1))
    action = draw(st.sampled_from(("tree", "tree", "tree", "twice", "remove", "swap", "insert")))
    about = f"line {at + 1}: {action}"
    if action == "tree":
        said, lines[at] = _json_text(json.loads(lines[at]), draw)
        about = f"line {at + 1}: {said}"
    elif action == "twice":
        lines.insert(at, lines[at])
    elif action == "remove":
        del lines[at]
    elif action == "swap":
        lines[at], lines[-1] = lines[-1], lines[at]
    else:
        line = json.dumps(any_value(draw)).encode()
        lines.insert(at, line)
        about += f" {line[:40]!r}"
    return Altered(b"\n".join(lines) + b"\n", about, of_bytes=False)


def _of_yaml(sound: bytes, draw: DRAW) -> Altered:
    raw = draw(st.sampled_from((None, None, *_RAW_YAML)))
    value = any_value if raw is None else lambda _: _RAW
    about, tree, key = alter_tree(yaml.safe_load(sound), draw, value=value)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=False)
    if key is not None:
        text = text.replace(_KEY, str(key))
    if raw is not None:
        text, about = text.replace(_RAW, raw), f"{about} ({raw})"
    return Altered(text.encode("utf-8", "surrogatepass"), about, of_bytes=False)


def _of_text(sound: bytes, draw: DRAW) -> Altered:
    lines = sound.decode().split("\n")
    at = draw(st.integers(0, len(lines) - 1))
    texts = [str(value) for value in VALUES if not isinstance(value, list | dict)]
    new = draw(st.one_of(st.sampled_from(texts), st.text()))
    action = draw(st.sampled_from(("replace", "insert", "append", "prefix", "twice", "remove")))
    if action in ("replace", "remove"):
        lines[at : at + 1] = [new] if action == "replace" else []
    elif action in ("insert", "twice"):
        lines.insert(at, new if action == "insert" else lines[at])
    else:
        lines[at] = lines[at] + new if action == "append" else new + lines[at]
    about = f"line {at + 1}: {action} {new[:40]!r}"
    return Altered("\n".join(lines).encode("utf-8", "surrogatepass"), about, of_bytes=False)


def _of_torch(sound: bytes, draw: DRAW) -> Altered:
    tree = torch.load(io.BytesIO(sound), weights_only=False)
    about, tree, _ = alter_tree(tree, draw, value=_tensor_or_value)
    file = io.BytesIO()
    torch.save(tree, file)
    return Altered(file.getvalue(), about, of_bytes=False)


def _tensor_or_value(draw: DRAW) -> Any:
    tensors = [
        *(torch.zeros(0), torch.zeros(()), torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(1, 1)),
        *(torch.full((16,), float("nan")), torch.zeros(16, dtype=torch.int64)),
        *(torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.complex64)),
        *(torch.zeros(1).expand(1 << 20), torch.zeros(4, device="meta")),
    ]
    return draw(st.sampled_from(tensors)) if draw(st.booleans()) else any_value(draw)


def alter_tree(tree: Any, draw: DRAW, *, value: Callable[[DRAW], Any]) -> tuple[str, Any, Any]:
    """One alteration at any depth: what was done, the new tree, and a key that is given twice."""
    paths = list(_paths(tree, ()))
    path = paths[draw(st.integers(0, len(paths) - 1))]
    found = functools.reduce(lambda node, key: node[key], path, tree)
    actions = ["replace", "replace", "replace"]
    if path:
        actions.append("remove")
    if isinstance(found, dict):
        actions += ["surplus", "duplicate"] if found else ["surplus"]
    if isinstance(found, list) and found:
        actions += ["reverse", "double"]
    action, key, where = draw(st.sampled_from(actions)), None, "".join(f"[{k!r}]" for k in path)
    if action == "remove":
        return f"{where or 'all'} removed", _without(tree, path), None
    if action == "replace":
        new: Any = value(draw)
    elif action == "surplus":
        new = {**found, draw(st.sampled_from(("x", "", "../x", "\0", "0"))): value(draw)}
    elif action == "duplicate":
        key = draw(st.sampled_from(list(found)))
        new = {**found, _KEY: found[key]}
    else:
        new = found[::-1] if action == "reverse" else found + found
    about = f"{where or 'all'} {action}" + (f" {str(new)[:60]!r}" if action == "replace" else "")
    return about, _with(tree, path, new), key


def _paths(tree: Any, path: Path_) -> Iterator[Path_]:
    yield path
    if isinstance(tree, dict):
        for key in tree:
            yield from _paths(tree[key], (*path, key))
    elif type(tree) in (list, tuple):
        for key in range(min(len(tree), 50)):
            yield from _paths(tree[key], (*path, key))


def _with(tree: Any, path: Path_, new: Any) -> Any:
    if not path:
        return new
    if isinstance(tree, dict):
        copy = type(tree)(tree)
        copy[path[0]] = _with(tree[path[0]], path[1:], new)
        return copy
    items = list(tree)
    items[path[0]] = _with(items[path[0]], path[1:], new)
    return type(tree)(items)


def _without(tree: Any, path: Path_) -> Any:
    if len(path) > 1:
        return _with(tree, path[:1], _without(tree[path[0]], path[1:]))
    if isinstance(tree, dict):
        return type(tree)((key, value) for key, value in tree.items() if key != path[0])
    return type(tree)(value for at, value in enumerate(tree) if at != path[0])
