"""Which pages of the key/value cache hold which tokens: a tree that sequences with a common beginning share.

Keys and values of a token follow from its adapter and the tokens up to it, so a page is known by the path of tokens
that leads to it: a node is a page's tokens after those of its parent (RadixAttention, Zheng et al. 2024,
arXiv:2312.07104, with edges of one page each). All pages of a path are full but the last one's. Nodes that no running
sequence uses are kept until their pages are needed; the least recently used go first.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class Node:
    """A page's tokens, after those of its parent.

    Attributes:
        page: None: its keys and values are gone; only those of nodes below it are left, which a window can make enough.
        users: the number of running sequences that read the page.
    """

    __slots__ = ("parent", "tokens", "page", "users", "children")

    def __init__(self, parent: "Node | None", tokens: tuple[int, ...], page: int | None):
        self.parent = parent
        self.tokens = tokens
        self.page = page
        self.users = 0
        self.children: dict[tuple[int, ...], Node] = {}


class PrefixTree:
    """Hands out pages and remembers what is in them.

    Args:
        pages: the number of pages; page 0 is never handed out.
        size: the tokens of a page.
        window: the tokens that a query sees, its own included; None: all.
    """

    def __init__(self, pages: int, size: int, window: int | None):
        self.size = size
        self.window = window
        self._free = list(range(pages - 1, 0, -1))
        # without users, from the least recently used on; a node comes before its parent where both ended together
        self._idle: OrderedDict[Node, None] = OrderedDict()
        self._roots: dict[Hashable, Node] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that are kept although no running sequence uses them."""
        return len(self._idle)

    def root(self, key: Hashable) -> Node:
        """Where the paths of an adapter begin."""
        return self._roots.setdefault(key, Node(None, (), None))

    def forget(self, key: Hashable) -> None:
        """Frees what is kept of an adapter that no running sequence uses."""
        nodes = [self._roots.pop(key)] if key in self._roots else []
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            if node in self._idle:
                del self._idle[node]
                self._free.append(self._take_page(node))

    def match(self, key: Hashable, tokens: Sequence[int], known: Sequence[Node] = ()) -> list[Node]:
        """The longest path of full pages with which `tokens` begin and from which a sequence can go on.

        Args:
            known: the nodes that it begins with.
        """
        path = list(known)
        node = path[-1] if path else self.root(key)
        while len(path) * self.size < len(tokens):
            start = len(path) * self.size
            child = node.children.get(tuple(tokens[start : start + self.size]))
            if child is None or len(child.tokens) < self.size:
                break
            path.append(child)
            node = child
        # not beyond a page that is gone although the next token sees it
        while path:
            first = self.first_visible(len(path) * self.size)
            gone = next((place for place in range(first, len(path)) if path[place].page is None), None)
            if gone is None:
                break
            path = path[:gone]
        return path

    @staticmethod
    def match_part(parent: Node, tokens: Sequence[int]) -> tuple[Node | None, int]:
        """The page after `parent` that begins with most of these tokens, and their number."""
        part, longest = None, 0
        for child in parent.children.values() if tokens else ():
            if child.tokens[0] == tokens[0] and child.page is not None:
                shared = common_length(child.tokens, tokens)
                if shared > longest:
                    part, longest = child, shared
        return part, longest

    @staticmethod
    def holds_rest(parent: Node, tokens: Sequence[int]) -> bool:
        """Whether a page after `parent` has exactly these tokens, which another sequence has computed."""
        child = parent.children.get(tuple(tokens))
        return child is not None and child.page is not None

    def first_visible(self, length: int) -> int:
        """The place of the first page that token `length`, counted from 0, sees."""
        return 0 if self.window is None else max(0, length - self.window + 1) // self.size

    def allocate(self) -> int:
        """A page for one sequence alone. At least one must be `available`."""
        if not self._free:
            node, _ = self._idle.popitem(last=False)
            self._free.append(self._take_page(node))
            self._prune(node)
        return self._free.pop()

    def free(self, page: int) -> None:
        """Takes back a page that is no node's."""
        self._free.append(page)

    @staticmethod
    def _take_page(node: Node) -> int:
        page, node.page = node.page, None
        assert page is not None
        return page

    def _prune(self, node: Node) -> None:
        """Removes a node that holds nothing, and its ancestors that do so without it."""
        while node.parent is not None and node.page is None and not node.children and not node.users:
            node.parent.children.pop(node.tokens, None)
            node = node.parent

    def use(self, nodes: Sequence[Node]) -> None:
        """Counts one more user of each."""
        for node in nodes:
            node.users += 1
            self._idle.pop(node, None)

    def leave(self, nodes: Sequence[Node]) -> None:
        """Counts one user less of each, which are adjacent nodes of a path, from its beginning on."""
        for node in reversed(nodes):
            node.users -= 1
            if not node.users and node.page is not None:
                self._idle[node] = None
            self._prune(node)

    def insert(self, parent: Node, tokens: tuple[int, ...], page: int | None) -> Node:
        """The node of these tokens, with one user; what it does not need of the page, or of others, becomes free."""
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(parent, tokens, page)
        elif node.page is None:
            node.page = page
        elif page is not None and page != node.page:
            self.free(page)
        self.use([node])
        for child in list(parent.children.values()):
            # what an earlier turn left
            if child in self._idle and len(child.tokens) < len(tokens) and tokens[: len(child.tokens)] == child.tokens:
                del self._idle[child]
                self._free.append(self._take_page(child))
                self._prune(child)
        return node

    def take(self, node: Node) -> int:
        """Removes a node whose only user goes on writing into its page; returns the page."""
        node.users -= 1
        page = self._take_page(node)
        self._prune(node)
        return page


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    shorter = min(len(a), len(b))
    return next((place for place in range(shorter) if a[place] != b[place]), shorter)
