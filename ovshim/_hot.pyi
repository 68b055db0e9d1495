from collections.abc import Callable
from typing import Any

INTERFACE: int

class Way:
    def __new__(
        cls,
        *,
        facts: tuple[tuple[Any, str, Any], ...],
        questions: tuple[tuple[Callable[[], Any], Any], ...],
        match: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None],
        holds: Callable[[], bool],
        sizes: tuple[tuple[int, ...], ...],
        fits: Callable[[Any], bool] | None,
        engine: Any,
        pool: Any,
        waiting: list[Any],
        slots: int,
        slot: Any,
        bound: int,
        infer: Callable[..., Any],
        as_tensor: Callable[[Any], Any],
        checked: bool,
        builder: Callable[[Any, Any], Any] | None,
        count: Callable[[], Any],
        raised: Callable[[Exception], None],
        left: Callable[[Any, BaseException | None, bool], None],
        marks: bytes,
        kept: Any,
        looked_at: tuple[tuple[int, int], ...],
        heads: tuple[tuple[int, int], ...],
    ) -> Way: ...

class Rest:
    left: int

    def __new__(
        cls,
        *,
        left: int,
        facts: tuple[tuple[Any, str, Any], ...],
        questions: tuple[tuple[Callable[[], Any], Any], ...],
        glance: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None,
        sizes: tuple[tuple[tuple[int, ...], ...], ...],
        tensor: type,
        dtypes: tuple[Any, ...],
        counts: tuple[Callable[[], Any], ...],
        module: Any,
        name: str,
        function: Any,
        method: Callable[..., Any],
    ) -> Rest: ...

class Shortcut:
    road: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    way: Way | None
    rest: Rest | None
    missed: int

    def __new__(cls, road: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Shortcut: ...
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any: ...

def read_words(addresses: bytes, /) -> bytes: ...
def same_words(state: tuple[Any, ...], /) -> bool: ...
def holders(pool: Any, /) -> list[int]: ...
def forget_held() -> None: ...
