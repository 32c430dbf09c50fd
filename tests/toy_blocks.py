"""vLLM's blocks in small: reference counts, and a prefix cache that gives what really lies in the blocks."""


class Blocks:
    """Blocks 1 to `count` - 1 (0 is vLLM's null block). A free block keeps its name until somebody is given it."""

    def __init__(self, count):
        self.free = list(range(1, count))
        self.refs = {}
        self.named = {}  # name: block
        self.name_of = {}

    def take(self, count):
        """`count` free blocks, which lose their names."""
        taken, self.free = self.free[:count], self.free[count:]
        for block in taken:
            self.refs[block] = 1
            self.unname(block)
        return taken

    def hits(self, names):
        """The blocks of the longest known beginning of `names`."""
        found = []
        for name in names:
            if name not in self.named:
                break
            found.append(self.named[name])
        return found

    def share(self, blocks):
        """Another request uses blocks."""
        for block in blocks:
            if block in self.free:
                self.free.remove(block)
            self.refs[block] = self.refs.get(block, 0) + 1

    def give_back(self, blocks):
        """A request uses blocks no more."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                del self.refs[block]
                self.free.append(block)

    def name(self, names, blocks):
        """Full blocks get their names; of two with one name the first keeps it."""
        for name, block in zip(names, blocks, strict=False):
            if name not in self.named and block not in self.name_of:
                self.named[name], self.name_of[block] = block, name

    def forget(self):
        """Empty the prefix cache."""
        self.named.clear()
        self.name_of.clear()

    def unname(self, block):
        """A block loses its name."""
        name = self.name_of.pop(block, None)
        if name is not None:
            del self.named[name]
