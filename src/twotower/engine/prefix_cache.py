"""Prefix cache: key pages and recurrent-state snapshots that later requests with the same beginning may reuse.

A recurrent state belongs to one exact prefix and can't be cut back to a shorter one. So keys are kept for every whole
page, but states only where another request is likely to continue: on a sparse grid, at the end of a prompt, and where
a prompt diverges from an earlier one. A request continues from its longest prefix that has both keys and states.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from twotower.engine.pool import StatePool
from twotower.model.pages import PAGE_SIZE
from twotower.model.state import MambaState

# Snapshot every _GRID tokens; the spacing is doubled until a prompt has at most _MOST_POINTS of them, or fewer if the
# room is small.
_GRID, _MOST_POINTS = 32, 16


class Snapshot(NamedTuple):
    """Recurrent states (1, …) after a prefix, one per `M` layer; at the end of a prompt also its next logits (1, v)."""

    mamba: tuple[MambaState, ...]
    next_logits: Tensor | None

    @property
    def num_bytes(self) -> int:
        logits = 0 if self.next_logits is None else self.next_logits.nbytes
        return logits + sum(t.nbytes for m in self.mamba for t in m)


class Match(NamedTuple):
    """A request's first `length` tokens are cached (maybe 0): in `pages`, with the state after them in `snapshot`.

    An earlier request began with the same `shared` tokens, at least `length` of them.
    """

    length: int
    pages: tuple[int, ...]
    snapshot: Snapshot | None
    shared: int


class Tree(NamedTuple):
    """What requests must have in common to share cached tokens: the `rope_length` (see `ContextState`), because the
    same tokens have other keys where RoPE turns otherwise, and the `salt` of their settings."""

    rope_length: int
    salt: str | None = None


@dataclasses.dataclass(eq=False)
class _Node:
    """The tokens of one page, which follow the parent's; only a leaf may have fewer than PAGE_SIZE. `length` counts
    tokens from the root, which alone knows its `tree`; `used` is the cache's clock at the node's last use."""

    tokens: tuple[int, ...]
    length: int
    page: int | None
    parent: "_Node | None"
    snapshot: Snapshot | None = None
    used: int = 0
    tree: "Tree | None" = None
    children: "dict[tuple[int, ...], _Node]" = dataclasses.field(default_factory=dict)


class PrefixCache:
    """A tree of pages in `pool`, with snapshots of at most `snapshot_bytes` in total.

    Least recently used entries are dropped first: snapshots to make room for newer ones, pages when a running request
    needs them. With a model without recurrent layers, a request can continue from every whole page.
    """

    def __init__(self, pool: StatePool, snapshot_bytes: int) -> None:
        self._pool = pool
        self._budget = snapshot_bytes
        # Of large states one prompt may fill half of the room, not all of it.
        self._most_points = min(_MOST_POINTS, max(snapshot_bytes // 2 // max(pool.slot_bytes, 1), 1))
        self._roots: dict[Tree, _Node] = {}
        self._clock = 0
        self.bytes_of_snapshots = 0
        self.is_whole = True  # False where an exception has struck while it was being changed

    def match(self, ids: Sequence[int], tree: Tree, *, needs_logits: bool) -> Match:
        """The longest cached prefix of ids; it is all ids only if their next logits are cached or not needed."""
        self._clock += 1
        node, found = self._roots.get(tree) or _root(tree), []
        while True:
            rest = tuple(ids[node.length : node.length + PAGE_SIZE])
            begun = [node.children.get(rest[:n]) for n in range(1, len(rest) + 1)]
            found += [child for child in begun if child is not None]
            if len(rest) < PAGE_SIZE or begun[-1] is None:
                break
            node = begun[-1]
        shared = node.length + max((_common(tokens, rest) for tokens in node.children), default=0)
        hit = max((n for n in found if self._is_usable(n, len(ids), needs_logits)), key=_length, default=None)
        if hit is None:
            return Match(0, (), None, shared)
        path = list(_path(hit))
        for node in path:
            node.used = self._clock
        pages = tuple(node.page for node in reversed(path) if node.page is not None)
        return Match(hit.length, pages, hit.snapshot or Snapshot((), None), shared)

    def points(self, match: Match, length: int) -> list[int]:
        """The prefix lengths, after its match, at which a request of `length` tokens should leave a snapshot."""
        wanted = {match.shared}
        if self._pool.slot_bytes:  # without recurrent layers every page is one anyway
            spacing = _GRID
            while length > spacing * self._most_points:
                spacing *= 2
            wanted |= set(range(spacing, length, spacing))
        return sorted({n for n in wanted if match.length < n < length} | {length})

    def insert(self, ids: Sequence[int], tree: Tree, table: Sequence[int], snapshots: Mapping[int, Snapshot]) -> None:
        """Keeps the pages of `table` that ids fill, and `snapshots`, whose keys are prefix lengths.

        May be called again as more ids of a prompt are absorbed.
        """
        self.is_whole = False
        self._clock += 1
        path = [self._roots.setdefault(tree, _root(tree))]
        for first in range(0, len(ids) - PAGE_SIZE + 1, PAGE_SIZE):
            path.append(self._child(path[-1], tuple(ids[first : first + PAGE_SIZE]), table))
        for length in sorted(snapshots):
            node = path[length // PAGE_SIZE]
            if length % PAGE_SIZE:
                node = self._child(node, tuple(ids[node.length : length]), table)
            self._attach(node, length, snapshots[length])
            path.append(node)
        self._clock += 1
        for node in sorted(path, key=_length, reverse=True):
            self._prune(node)
        self.is_whole = True

    def free_pages(self, count: int) -> None:
        """Drops leaves that no request uses until the pool has `count` free pages or no such leaf is left."""
        while self._pool.num_free < count:
            held = [(node, node.page) for node in self._nodes() if node.page is not None]
            # several snapshots within one page are nodes that share it
            ours = collections.Counter(page for _, page in held)
            leaves = [node for node, page in held if not node.children and self._pool.num_uses(page) == ours[page]]
            if not leaves:
                return
            self.is_whole = False
            self._remove(min(leaves, key=_used))
            self.is_whole = True

    def clear(self) -> None:
        """Drops everything."""
        for node in list(self._nodes()):
            node.children.clear()
            self._remove(node)

    def pages(self) -> list[int]:
        """The page of every node that has one."""
        return [node.page for node in self._nodes() if node.page is not None]

    def forget(self) -> None:
        """Drops everything and leaves the pool as it is, which then must count anew what is in use."""
        self._roots.clear()
        self.bytes_of_snapshots = 0
        self.is_whole = True

    def _is_usable(self, node: _Node, length: int, needs_logits: bool) -> bool:
        """Whether a request of `length` tokens can continue from this node."""
        if node.snapshot is None and (self._pool.slot_bytes or len(node.tokens) < PAGE_SIZE):
            return False
        has_logits = node.snapshot is not None and node.snapshot.next_logits is not None
        return node.length < length or has_logits or not needs_logits

    def _child(self, parent: _Node, tokens: tuple[int, ...], table: Sequence[int]) -> _Node:
        """The child with these tokens; a missing one is made, with its page from `table`."""
        node = parent.children.get(tokens)
        if node is None:
            page = table[parent.length // PAGE_SIZE] if table else None
            if page is not None:
                self._pool.hold_(page)
            node = parent.children[tokens] = _Node(tokens, parent.length + len(tokens), page, parent)
        node.used = self._clock
        return node

    def _attach(self, node: _Node, length: int, snapshot: Snapshot) -> None:
        assert node.length == length, "a state belongs to exactly the tokens it has seen"
        if node.snapshot is not None:
            if node.snapshot.next_logits is not None or snapshot.next_logits is None:
                return
            self._detach(node)
        if snapshot.num_bytes > self._budget:
            return
        while self.bytes_of_snapshots + snapshot.num_bytes > self._budget:
            oldest = min((n for n in self._nodes() if n.snapshot is not None and n.snapshot.num_bytes), key=_age)
            self._detach(oldest)
            self._prune(oldest)
        node.snapshot = snapshot
        self.bytes_of_snapshots += snapshot.num_bytes

    def _detach(self, node: _Node) -> None:
        assert node.snapshot is not None
        self.bytes_of_snapshots -= node.snapshot.num_bytes
        node.snapshot = None

    def _prune(self, node: _Node) -> None:
        """Removes nodes that no longer lead to a state, from a leaf upwards; those used just now stay."""
        while not node.children and node.parent is not None and node.used < self._clock:
            if node.parent.children.get(node.tokens) is not node or self._is_usable(node, node.length + 1, False):
                return
            parent = node.parent
            self._remove(node)
            node = parent

    def _remove(self, node: _Node) -> None:
        assert not node.children
        if node.snapshot is not None:
            self._detach(node)
        if node.page is not None:
            self._pool.drop_(node.page)
        if node.parent is not None:
            node.parent.children.pop(node.tokens, None)
            if node.parent.tree is not None and not node.parent.children:
                self._roots.pop(node.parent.tree, None)

    def _nodes(self) -> Iterator[_Node]:
        """All nodes except the roots."""
        waiting = [child for root in self._roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node


def _root(tree: Tree) -> _Node:
    return _Node((), 0, None, None, tree=tree)


def _path(node: _Node) -> Iterator[_Node]:
    """The node and those above it, without the root."""
    while node.parent is not None:
        yield node
        node = node.parent


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _length(node: _Node) -> int:
    return node.length


def _used(node: _Node) -> int:
    return node.used


def _age(node: _Node) -> tuple[int, int]:
    """Sort key: the least recently used node first, and of one prompt's nodes the shorter prefix first."""
    return node.used, node.length
