"""Keep one block of a denoiser on the device at a time, and calibrate it block by block.

In a transformer the output of a block is the input of the next. All calls stop at the same block: their inputs, which
are outputs of earlier blocks, wait in RAM or on disk, the block comes to the device once, runs on every call, and
leaves (as in GPTQ, arXiv 2210.17323). Earlier blocks do not run again: the denoiser's own code is called with them
replaced by what they returned, so that whatever it does between blocks need not be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.denoisers import block_names, output_of
from vqdm.diffusion.hessians import DenoiserCall, input_key
from vqdm.errors import UserError
from vqdm.layers.quantized import decoded_once, drop_decoded

FIRST = -1  # number of the call that shows how large inputs are
ROUNDING = 1e-3  # of sums over inputs that ought to be equal


class BlockSwapper:
    """Keeps the blocks of a denoiser on the CPU, and on the device that which runs, until another one does.

    It goes back to the tensors that it had there, such as those that are mapped from files and take no RAM.

    A backward pass needs gradient checkpointing, which runs each block again just before its gradients are computed.

    Raises:
        UserError: the denoiser's class would then name another device as its own.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device):
        self.denoiser, self.device, self.names = denoiser, device, block_names(denoiser)
        self.replaced: set[str] = set()  # blocks that do not run though they are called
        self._inside, self._home = None, []
        self._outside: list[tuple[Tensor, torch.device]] = []
        self.settle()
        for name in self.names:
            for tensor in _tensors(denoiser.get_submodule(name)):
                tensor.data = tensor.data.to("cpu")
        if denoiser.device.type != device.type:
            self.close()
            raise _whole_only(denoiser, "has nothing before its blocks")
        self._hooks = [
            denoiser.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: self.enter(name), prepend=True)
            for name in self.names
        ]

    def enter(self, name: str) -> None:
        """Bring a block to the device, and the one that is there back."""
        if name == self._inside or name in self.replaced:
            return
        self.leave()
        self._home = [(tensor, tensor.data) for tensor in _tensors(self.denoiser.get_submodule(name))]
        for tensor, data in self._home:
            tensor.data = data.to(self.device)
        self._inside = name

    def settle(self) -> None:
        """Bring what is outside of the blocks to the device, such as codebooks that new layers share."""
        blocks = {id(one) for name in self.names for one in _tensors(self.denoiser.get_submodule(name))}
        for tensor in _tensors(self.denoiser):
            if id(tensor) not in blocks and tensor.device != self.device:
                self._outside.append((tensor, tensor.device))
                tensor.data = tensor.data.to(self.device)

    def leave(self) -> None:
        """Take the block that is on the device back; before its layers are replaced."""
        for tensor, data in self._home:
            tensor.data = data
        if self._home and self.device.type != "cpu":
            drop_decoded(self.denoiser.get_submodule(self._inside))
        self._inside, self._home = None, []

    @contextmanager
    def holding(self, name: str) -> Iterator[nn.Module]:
        """Inside, a block is on the device, to be changed there; it goes back as it then is."""
        self.leave()
        block = self.denoiser.get_submodule(name)
        for tensor in _tensors(block):
            tensor.data = tensor.data.to(self.device)
        self._inside = name
        try:
            yield block
        finally:
            self._inside = None
            for tensor in _tensors(block):
                tensor.data = tensor.data.to("cpu")

    def close(self) -> None:
        """Take everything back to where it was, blocks to the CPU, and remove all hooks."""
        self.leave()
        for tensor, place in self._outside:
            tensor.data = tensor.data.to(place)
        for hook in getattr(self, "_hooks", ()):
            hook.remove()


def _whole_only(denoiser: nn.Module, why: str) -> UserError:
    flags = "use --offload none, or for fine-tuning --finetune_scope denoiser"
    return UserError(f"block by block: a {type(denoiser).__name__} {why}; {flags}")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class _Stop(Exception):
    pass


class BlockWalk:
    """Calls of a denoiser that go from block to block together.

    Args:
        swapper: of the denoiser.
        calls: number of a recorded point → a call on it alone; `FIRST` → that which all processes make.
        folder: for what blocks returned; None keeps it in RAM.
        dtype: that it is kept in, where it is wider; blocks get it in the type that it was returned in. None keeps all.

    Attributes:
        keep: whether outputs that `running` sees are those that the next block gets. Not while the block is to change.

    Raises:
        UserError: the blocks do not run one after another, each once in a call.
    """

    def __init__(
        self,
        swapper: BlockSwapper,
        calls: dict[int, DenoiserCall],
        folder: Path | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.swapper, self.denoiser, self.calls, self.keep = swapper, swapper.denoiser, calls, False
        self.names = swapper.names
        self.blocks = [self.denoiser.get_submodule(name) for name in self.names]
        self.lists = [name.rpartition(".")[0] for name in self.names]
        self.outputs = _Outputs(folder, swapper.device, dtype)
        self.position = dict.fromkeys(calls, 0)
        self.sources = find_sources(self, calls[FIRST]())

    def place(self, layers: list[Layer]) -> int:
        """Return the number of the block that layers are in; 0 for those before, and the number of blocks for others.

        Layers of one block alone are allowed.
        """
        (block,) = {layer.block for layer in layers}
        ends = {"stem": 0, "head": len(self.names)}
        return ends[block] if block in ends else self.names.index(block)

    @contextmanager
    def running(self, layers: list[Layer]) -> Iterator[Callable[..., None]]:
        """Inside, `run(call, of)` runs a call until the block of the layers is done, as `hessians.stopping_after`.

        `of` is the `DenoiserCall` that `call` was made by, or None for the first call.
        """
        place = self.place(layers)
        self.reach(place)

        def run(call: dict, of: DenoiserCall | None = None) -> None:
            key = FIRST if of is None else of.recorded[0]
            if self.position[key] > place:  # it has kept outputs, but more is to be recorded: once more from the start
                self._replay(key, place)
            inside = layers[0].block not in ("stem", "head")
            kept = self.keep and inside and (of is None or of.recorded == of.points)
            self._step(key, place, call, kept, layers[0].block == "stem")

        yield run

    def owns(self, call: DenoiserCall) -> bool:
        """Return whether a call is one of this walk's, or on such a point."""
        return call.recorded[0] in self.calls

    def reach(self, place: int) -> None:
        """Bring all calls to a block, in the present state of the blocks before it."""
        for block in range(min(self.position.values()), place):
            with decoded_once(self.blocks[block]):
                for key, position in self.position.items():
                    if position == block:
                        self._step(key, block, self.calls[key](), kept=True)

    def output(self, keys: Sequence[int], place: int, call: dict):
        """Return what a block returns for the points `keys` in one `call`, with gradients where the caller has them.

        What the blocks before it returned must wait, in equal shapes. Guidance branches are outermost in the batch.
        """
        earlier = {index: partial(self.outputs.together, keys, index) for index in self.sources[place]}
        return self.run(call, place, earlier, lambda of: collated([self.outputs.like(key, of) for key in keys]))

    def restart(self) -> None:
        """Let all calls begin again, at the first block."""
        self.outputs.clear()
        self.position = dict.fromkeys(self.calls, 0)

    def _replay(self, key: int, place: int) -> None:
        self.position[key] = 0
        for block in range(place):
            self._step(key, block, self.calls[key](), kept=True)

    @torch.no_grad()
    def _step(self, key: int, place: int, call: dict, kept: bool, stem: bool = False) -> None:
        """Run a call until a block is done; `kept` moves it on to the next."""
        earlier = {index: partial(self.outputs.get, key, index) for index in self.sources[place]}
        shapes = partial(self.outputs.like, key)
        returned = self.run(call, place, earlier, shapes, stopped if stem else None)
        if kept:
            later = {index for some in self.sources[place + 1 :] for index in some}
            self.outputs.put(key, place, self.lists[place], returned, later)
            self.position[key] = place + 1

    def run(
        self,
        call: dict,
        place: int,
        earlier: dict[int, Callable[[], object]],
        like: Callable[[str], object],
        entered: Callable[..., None] | None = None,
    ):
        """Run a call with the blocks before `place` replaced, until that block is done; return what it returns.

        Args:
            earlier: by number of a block, gives what it returned. Blocks of the same list return the same.
            like: gives zeros for what blocks of another list returned.
            entered: a hook that is called before the block.
        """
        by_list = {self.lists[index]: get for index, get in sorted(earlier.items())}
        known, found = {}, []

        def replaced(index: int):
            get = earlier.get(index) or by_list.get(self.lists[index]) or partial(like, self.lists[index])
            if get not in known:
                known[get] = get()
            return known[get]

        def done(_, args, output) -> None:
            found.append(output)
            raise _Stop

        with ExitStack() as stack:
            if place < len(self.blocks):
                block = self.blocks[place]
                if entered:
                    hook = block.register_forward_pre_hook(entered, with_kwargs=True, prepend=True)
                    stack.callback(hook.remove)
                stack.callback(block.register_forward_hook(done).remove)
            self.swapper.replaced = set(self.names[:place])
            stack.callback(self.swapper.replaced.clear)
            for index, block in enumerate(self.blocks[:place]):
                block.forward = lambda *_, index=index, **__: replaced(index)
                stack.callback(delattr, block, "forward")
            with suppress(_Stop):
                found.append(self.denoiser(**call))
        return found[0] if found else None


def stopped(*_) -> None:
    """Hook before a block that ends the call."""
    raise _Stop


def find_sources(walk: BlockWalk, call: dict) -> list[tuple[int, ...]]:
    """Return for every block, and for what follows the last, the fewest earlier blocks whose outputs it depends on.

    Tried are the block before it in its list, then the last one of each list, then all of them. A block that gets what
    it gets in a whole call has its sources.
    """
    arguments, outputs, order, K = {}, {}, [], len(walk.blocks)
    with ExitStack() as stack, torch.no_grad():
        for index, block in enumerate(walk.blocks):

            def entered(_, args, kwargs, index=index) -> None:
                order.append(index)
                arguments[index] = _sums((args, kwargs))

            def done(_, args, output, index=index) -> None:
                outputs[index] = tree_map(_to_cpu, output)

            stack.callback(block.register_forward_pre_hook(entered, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(done).remove)
        arguments[K] = _sums(output_of(walk.denoiser(**call)))
    if order != list(range(K)):
        raise _whole_only(walk.denoiser, "does not run its blocks in turn")
    device, found = walk.swapper.device, [()]
    like = {walk.lists[index]: partial(_zeros, outputs[index], device) for index in range(K)}
    for place in range(1, K + 1):
        latest = {walk.lists[index]: index for index in range(place)}
        own = tuple(index for of, index in latest.items() if of == walk.lists[min(place, K - 1)])
        for sources in (own, tuple(latest.values()), tuple(range(place))):
            seen = []

            def compared(_, args, kwargs, seen=seen) -> None:
                seen.append(_sums((args, kwargs)))
                raise _Stop

            earlier = {index: partial(tree_map, partial(_to_device, device), outputs[index]) for index in sources}
            result = walk.run(call, place, earlier, lambda of: like[of](), compared)
            seen = seen or [_sums(output_of(result))]
            if _alike(seen[0], arguments[place]):
                break
        else:
            raise _whole_only(walk.denoiser, "does not do the same in each call")
        found.append(sources)
    return found


def _sums(tree) -> list[float]:
    tensors = [one for one in tree_leaves(tree) if isinstance(one, Tensor) and one.is_floating_point() and one.dim()]
    return [value for one in tensors for value in input_key("", one, []) if value != ""]


def _alike(one: list[float], other: list[float]) -> bool:
    size = max(map(abs, other), default=0.0)
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING**2 * size) for a, b in zip(one, other, strict=True)
    )


def _to_cpu(leaf):
    return leaf.detach().to("cpu") if isinstance(leaf, Tensor) else leaf


def _to_device(device: torch.device, leaf):
    return leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf


def collated(trees: list):
    """Return what a block returns for several points in one call, of what it returns for each: [A, ...] → [A·B, ...].

    Letters: A guidance branches, B points.
    """
    leaves, spec = zip(*map(tree_flatten, trees), strict=True)
    together = [
        torch.stack(rows).transpose(0, 1).flatten(0, 1) if isinstance(rows[0], Tensor) else rows[0]  # [B, A, ...]
        for rows in zip(*leaves, strict=True)
    ]
    return tree_unflatten(together, spec[0])


def _zeros(tree, device: torch.device):
    make = partial(torch.zeros_like, device=device)
    return tree_map(lambda leaf: make(leaf) if isinstance(leaf, Tensor) else leaf, tree)


class _Outputs:
    """What blocks returned, by call and block, in RAM or in files of a folder."""

    def __init__(self, folder: Path | None, device: torch.device, dtype: torch.dtype | None):
        self.folder, self.device, self.dtype, self.held, self.shapes = folder, device, dtype, {}, {}

    def put(self, key: int, block: int, of: str, tree, later: set[int]) -> None:
        """Keep what a block of a list returned, if it is among the `later` ones; drop the call's that are not."""
        for other in [other for known, other in self.held if known == key and other not in later]:
            self._drop(key, other)
        self.shapes[key, of] = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, tree)
        if block not in later:
            return
        leaves, spec = tree_flatten(tree)
        types = [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves]
        leaves = [_to_cpu(self._narrowed(leaf)) for leaf in leaves]
        if self.folder is not None:
            tensors = {str(k): leaf.clone() for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._file(key, block))
            leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.held[key, block] = leaves, types, spec

    def get(self, key: int, block: int):
        """Return it, on the device."""
        leaves, types, spec = self.held[key, block]
        if self.folder is not None:
            tensors = load_file(self._file(key, block))
            leaves = [tensors.get(str(k), leaf) for k, leaf in enumerate(leaves)]
        leaves = [_to_device(self.device, leaf) for leaf in leaves]
        return tree_unflatten(
            [leaf.to(dtype) if dtype else leaf for leaf, dtype in zip(leaves, types, strict=True)], spec
        )

    def _narrowed(self, leaf):
        wide = self.dtype and isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(self.dtype) if wide and leaf.dtype.itemsize > self.dtype.itemsize else leaf

    def together(self, keys: Sequence[int], block: int):
        """Return what a block returned for several points, as of one call."""
        return collated([self.get(key, block) for key in keys])

    def kind(self, key: int) -> str:
        """Return a text that is equal for the points that one call can take together."""
        shapes = {
            of: [one.shape for one in tree_leaves(tree) if isinstance(one, Tensor)]
            for (held, of), tree in self.shapes.items()
            if held == key
        }
        return str(shapes)

    def like(self, key: int, of: str):
        """Return zeros in the shapes of what a block of a list returned."""
        return _zeros(self.shapes[key, of], self.device)

    def clear(self) -> None:
        for place in list(self.held):
            self._drop(*place)

    def _drop(self, key: int, block: int) -> None:
        del self.held[key, block]
        if self.folder is not None:
            self._file(key, block).unlink(missing_ok=True)

    def _file(self, key: int, block: int) -> Path:
        return self.folder / f"{key}.{block}.safetensors"
