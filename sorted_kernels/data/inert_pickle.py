"""Reads a pickle of plain data without executing anything in it.

A pickle is a program: ``pickle.load`` imports and calls what the file names. Here the few
instructions that build data are interpreted, and the names of NumPy's array constructors are
remembered as text; nothing is imported and nothing is called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

ARRAY_NAMES = frozenset(
    f"{module} {name}"
    for module, name in (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )
)


class Name(NamedTuple):
    """A global that the pickle names; only text."""

    text: str


class Made:
    """What the pickle would have made by calling ``name(*arguments)``, and its state if set."""

    def __init__(self, name: Name, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_CONTAINERS: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_LITERALS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINSTRING", "SHORT_BINSTRING", "BINBYTES")
    + ("SHORT_BINBYTES", "BINUNICODE", "SHORT_BINUNICODE")
)
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset(("BINPUT", "LONG_BINPUT"))
_GETS = frozenset(("BINGET", "LONG_BINGET"))


def load(content: bytes) -> Any:
    """The data that a pickle describes.

    Args:
        content: The pickle, of protocol 2 to 4.

    Returns:
        Dictionaries, lists, tuples, numbers, texts and bytes; a NumPy array is a :class:`Made`.

    Raises:
        ValueError: The pickle ends early, is malformed, names anything but NumPy's array
            constructors, or uses an instruction that plain data does not need.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        (result,) = machine.stack
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is malformed ({type(error).__name__}: {error})") from error
    return result


class _Machine:
    """The stack and memo of a pickle that is being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument.encode("latin1") if name.endswith("STRING") else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._take(_TUPLES[name])))
        elif name in _PUTS:
            self.memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name not in ("PROTO", "FRAME"):
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        """The instructions that put together what is on the stack."""
        stack = self.stack
        if name == "TUPLE":
            stack.append(tuple(self._take_to_mark()))
        elif name == "APPENDS":
            items = self._take_to_mark()
            stack[-1].extend(items)
        elif name == "APPEND":
            (item,) = self._take(1)
            stack[-1].append(item)
        elif name == "SETITEMS":
            items = self._take_to_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "SETITEM":
            key, value = self._take(2)
            stack[-1][key] = value
        elif name == "GLOBAL":
            stack.append(_array_name(argument))
        elif name == "STACK_GLOBAL":
            stack.append(_array_name(" ".join(self._take(2))))
        elif name == "REDUCE":
            called, arguments = self._take(2)
            if not isinstance(called, Name) or not isinstance(arguments, tuple):
                raise ValueError(f"it calls {called!r}, which is no name of an array constructor")
            stack.append(Made(called, arguments))
        elif name == "BUILD":
            (state,) = self._take(1)
            if not isinstance(stack[-1], Made):
                raise ValueError(f"it gives a state to a {type(stack[-1]).__name__}")
            stack[-1].state = state
        else:
            raise ValueError(f"it has the instruction {name}, which plain data does not need")

    def _take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _take_to_mark(self) -> list[Any]:
        marks = [place for place, item in enumerate(self.stack) if item is _MARK]
        place = marks[-1]
        taken = self.stack[place + 1 :]
        del self.stack[place:]
        return taken


def _array_name(text: str) -> Name:
    if text not in ARRAY_NAMES:
        raise ValueError(
            f"it names {text.replace(' ', '.')!r}; allowed are NumPy's array constructors alone, "
            "and nothing of it was run"
        )
    return Name(text)
