"""Frozen classes with slots, as those of `dataclasses`, at a tenth of what these cost at the start of a command.

Used by what every command about an image imports. Importing `dataclasses` (with `inspect` and `ast`) and generating
five methods for each of a dozen classes was 40 % of the instructions of a small `qcowfs diff --blocks`; here `__init__`
is generated when the first object is made, and the other methods are the same functions for all classes. Type checkers
see the real thing. For classes without bases; any thread.
"""

from __future__ import annotations

from operator import attrgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass, field
else:

    class field:
        """What a field is made of where nothing is given."""

        def __init__(self, *, default_factory):
            self.default_factory = default_factory

    def dataclass(*, frozen, slots, kw_only=False):
        """Return a decorator for a class of annotated fields; there is no other kind than frozen, with slots."""
        if not (frozen and slots):
            raise TypeError("only frozen classes with slots are made here")
        return lambda plain: _made(plain, kw_only=kw_only)


__all__ = ["dataclass", "field"]


def _made(plain, *, kw_only):  # type: ignore[no-untyped-def]
    names = tuple(plain.__annotations__)
    namespace = {key: value for key, value in vars(plain).items() if key not in (*names, "__dict__", "__weakref__")}
    values = attrgetter(*names) if len(names) > 1 else lambda self: (getattr(self, names[0]),)

    def __init__(self, *given, **named):  # type: ignore[no-untyped-def]
        initialise = _initialiser(made, names, vars(plain), kw_only=kw_only)  # type: ignore[no-untyped-call]
        type.__setattr__(made, "__init__", initialise)
        initialise(self, *given, **named)

    def __eq__(self, other):  # type: ignore[no-untyped-def]
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self):  # type: ignore[no-untyped-def]
        return hash(values(self))

    def __repr__(self):  # type: ignore[no-untyped-def]
        told = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.__class__.__qualname__}({told})"

    def fields(self):  # type: ignore[no-untyped-def]
        from dataclasses import make_dataclass  # for its `replace`

        return make_dataclass("fields", names).__dataclass_fields__  # type: ignore[attr-defined]

    methods = (__init__, __eq__, __hash__, __repr__, _refuse, _refuse_to_delete, property(fields))
    keys = ("__init__", "__eq__", "__hash__", "__repr__", "__setattr__", "__delattr__", "__dataclass_fields__")
    made = type(plain.__name__, (), {**dict(zip(keys, methods, strict=True)), **namespace, "__slots__": names})
    return made


def _refuse(self, name, value):  # type: ignore[no-untyped-def]
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self, name):  # type: ignore[no-untyped-def]
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _initialiser(made, names, defaults, *, kw_only):  # type: ignore[no-untyped-def]
    """Return an `__init__` that takes the fields as arguments; a slot's own setter does not ask `__setattr__`."""
    scope = {}
    words, lines = [], []
    for name in names:
        scope[f"set_{name}"] = vars(made)[name].__set__
        value = name
        word = name
        if name in defaults:
            scope[f"default_{name}"] = defaults[name]
            word = f"{name}=default_{name}"
            if hasattr(defaults[name], "default_factory"):
                value = f"default_{name}.default_factory() if {name} is default_{name} else {name}"
        words.append(word)
        lines.append(f"    set_{name}(self, {value})")
    head = ", ".join(["self", *(["*"] if kw_only else []), *words])
    exec("\n".join([f"def __init__({head}):", *lines]), scope)
    return scope["__init__"]
