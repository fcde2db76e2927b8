"""What stands in place of Opacus' classes, and of torchvision's, while `opacus_suite.py` runs Opacus' own tests."""

from __future__ import annotations

import sys
import types
from collections import Counter, defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

SEEN: Counter[str] = Counter()  # how often the tests came through our capture: what passes without it proves nothing


def replace_engine(key: str, one_pass: bool) -> None:
    """Our engine and gradients under Opacus' names, from now on: its key "secret" or from "torch"'s own generator;
    noise and update in one pass, or the private gradient left in ``p.grad`` for the tests to look at."""
    import opacus
    import opacus.grad_sample
    import opacus.utils.adaptive_clipping.adaptive_clipping_utils  # has classes derived from what is replaced
    import opacus.utils.fast_gradient_clipping_utils
    import opacus.utils.per_sample_gradients_utils

    from dp2vae_fast.engine import module as our_module
    from dp2vae_fast.engine import optimizer as our_optimizer
    from dp2vae_fast.engine import privacy_engine
    from dp2vae_fast.engine.capture import capture as our_capture
    from dp2vae_fast.engine.gradients.products import add
    from dp2vae_fast.engine.keystream import Keystream

    class Observed(our_capture.Hooks):
        """Show in every backward pass, where Opacus shows them, the gradients that the optimizer will take."""

        def _record(self, layer: nn.Module, rule: Any, trainable: dict, *use: Any) -> None:
            super()._record(layer, rule, trainable, *use)
            SEEN["layer uses"] += 1
            capture: Any = self._capture
            for p in trainable.values():
                uses = capture.book.uses[p]
                scale = capture.records if capture.loss_reduction == "mean" else 1
                if capture.norms_only:  # ghost clipping: `_norm_sample` instead of `grad_sample`
                    p._norm_sample = (scale * add(uses).norm_sq()[0].sqrt()).to(p.dtype)
                    continue
                batches = p.grad_sample if isinstance(p.grad_sample, list) else [p.grad_sample]
                earlier = [x for x in batches if x is not None][: None if len(uses) == 1 else -1]
                batches = [*earlier, (scale * add(uses).grad_sample()).to(p.dtype)]
                p.grad_sample = batches[0] if len(batches) == 1 else batches

    class Shows:
        """What our two kinds of module have in common with Opacus' as seen from its tests."""

        def __init__(
            self,
            m: nn.Module,
            *,
            batch_first: bool = True,
            loss_reduction: str = "mean",
            strict: bool = True,
            force_functorch: bool = False,
            max_grad_norm: float = 1.0,
            use_ghost_clipping: bool | None = None,
        ) -> None:
            self._norms_only = use_ghost_clipping is not None
            self._bound = max_grad_norm
            super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)

        def _attach(self, m: nn.Module) -> None:
            our_capture.Hooks, keep = Observed, our_capture.Hooks
            try:
                super()._attach(m)
            finally:
                our_capture.Hooks = keep
            self.capture.loss_reduction, self.capture.norms_only = self.loss_reduction, self._norms_only
            # Nobody takes the gradients of a bare module: each batch makes room for the next.
            self.capture.owners = defaultdict(lambda: self.capture.clear, dict.fromkeys(m.parameters(), self._next))
            for p in m.parameters():
                if p.requires_grad:
                    p.grad_sample = p._norm_sample = None

        def _next(self) -> None:
            if not self.capture.grad_accumulation_allowed:
                raise ValueError("a second batch before a step, under Poisson sampling")
            self.capture.clear()

        def set_grad_sample_to_none(self) -> None:
            super().set_grad_sample_to_none()
            for p in self._module.parameters():
                p.grad_sample = None

        def get_norm_sample(self) -> Tensor:
            norms = [p._norm_sample for p in self._module.parameters() if p.requires_grad]
            return torch.stack(norms).norm(dim=0)

        def get_clipping_coef(self) -> Tensor:
            return (self._bound / self.get_norm_sample()).clamp(max=1)

    class ObservedHooks(Shows, our_module.FusedGradSampleHooks):
        pass

    class ObservedModule(Shows, our_module.FusedGradSampleModule):
        # A test exchanges one of these: for us it tests the same rule twice.
        GRAD_SAMPLERS: ClassVar = dict(opacus.grad_sample.GradSampleHooks.GRAD_SAMPLERS)

        def __init__(self, m: nn.Module, **kwargs: Any) -> None:
            nn.Module.__init__(self)  # before the first attribute
            Shows.__init__(self, m, **kwargs)

    class ObservedOptimizer(our_optimizer.DPOptimizer):
        grad_samples = opacus.optimizers.DPOptimizer.grad_samples

        def clip_and_accumulate(self) -> None:
            super().clip_and_accumulate()
            for p in self.params:
                p.summed_grad = self._sums.get(p)

        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none)
            for p in self.params:
                p.grad_sample = None
                if not self._is_last_step_skipped:
                    p.summed_grad = None

    class Engine(privacy_engine.PrivacyEngine):
        """Ours, with "fused" for every mode."""

        def __init__(self, **kwargs: Any) -> None:
            if key == "torch":
                kwargs.setdefault("keystream", Keystream.from_generator(torch.default_generator))
            super().__init__(**kwargs)

        def make_private(self, *, grad_sample_mode: str = "fused", criterion: Any = None, **kwargs: Any) -> Any:
            kwargs.setdefault("materialize_grad", not one_pass)
            model, optimizer, loader = super().make_private(grad_sample_mode="fused", **kwargs)
            return (model, optimizer, criterion, loader) if "ghost" in grad_sample_mode else (model, optimizer, loader)

        def make_private_with_epsilon(self, *, grad_sample_mode: str = "fused", **kwargs: Any) -> Any:
            return super().make_private_with_epsilon(grad_sample_mode=grad_sample_mode, **kwargs)

    def optimizer_by_hand(optimizer: Any, *, generator: Any = None, **kwargs: Any) -> Any:
        """For `DPOptimizerFastGradientClipping`: ours, on the gradients of the module that the parameters are of."""
        p = optimizer.param_groups[0]["params"][0]
        capture = next(c for c in captures if p in c._names)
        key = Keystream.secret() if generator is None else Keystream.from_generator(generator)
        return ObservedOptimizer(
            optimizer, capture=capture, stream=key.stream("DP-SGD"), materialize_grad=True, **kwargs
        )

    captures: list[our_capture.Capture] = []
    attach = Shows._attach

    def remember(self: Any, m: nn.Module) -> None:
        attach(self, m)
        captures.append(self.capture)

    Shows._attach = remember  # type: ignore[method-assign]

    def wrap(model: nn.Module, grad_sample_mode: str = "hooks", wrap_model: bool = True, **kwargs: Any) -> nn.Module:
        return (ObservedModule if wrap_model else ObservedHooks)(model, **kwargs)

    ghost = "grad_sample_module_fast_gradient_clipping"
    for name, ours in {
        "opacus.PrivacyEngine": Engine,
        "opacus.privacy_engine.PrivacyEngine": Engine,
        "dp2vae_fast.engine.privacy_engine.FusedGradSampleModule": ObservedModule,
        "dp2vae_fast.engine.privacy_engine.FusedGradSampleHooks": ObservedHooks,
        "dp2vae_fast.engine.privacy_engine.DPOptimizer": ObservedOptimizer,
        "opacus.grad_sample.GradSampleModule": ObservedModule,
        "opacus.grad_sample.grad_sample_module.GradSampleModule": ObservedModule,
        "opacus.grad_sample.gsm_exp_weights.GradSampleModuleExpandedWeights": ObservedModule,
        "opacus.grad_sample.GradSampleHooks": ObservedHooks,
        "opacus.grad_sample.GradSampleModuleFastGradientClipping": ObservedModule,
        "opacus.grad_sample.GradSampleHooksFastGradientClipping": ObservedHooks,
        f"opacus.grad_sample.{ghost}.GradSampleModuleFastGradientClipping": ObservedModule,
        "opacus.grad_sample.utils.get_gsm_class": lambda mode: ObservedModule,
        "opacus.utils.per_sample_gradients_utils.wrap_model": wrap,
        "opacus.optimizers.DPOptimizerFastGradientClipping": optimizer_by_hand,
        "opacus.utils.fast_gradient_clipping_utils.DPLossFastGradientClipping": lambda m, o, criterion, *_: criterion,
        "opacus.grad_sample.embedding_norm_sample.compute_embedding_norm_sample": embedding_norms,
    }.items():
        place, _, attribute = name.rpartition(".")
        target = sys.modules[place]
        if not hasattr(target, attribute):
            raise RuntimeError(f"this Opacus has no {name}: adapt benchmarks/opacus_stand_ins.py")
        setattr(target, attribute, ours)


def embedding_norms(layer: nn.Embedding, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """The norms that our rule finds, in the shape of Opacus' norm samplers."""
    from dp2vae_fast.engine.gradients.layers import embedding_rule

    gradient: Any = embedding_rule(layer, activations[0], backprops)["weight"]
    return {layer.weight: gradient.norm_sq()[0].sqrt()}


class Network(nn.Module):
    """Stands in for torchvision's networks in tests that only ask for some batch-normalised one."""

    def __init__(self, weights: None = None) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def stand_in_torchvision() -> bool:
    """Random images and two batch-normalised networks, where torchvision is not installed. True if it was needed."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    else:
        return False

    class FakeData(torch.utils.data.Dataset):
        def __init__(self, size: int, image_size: tuple[int, ...], num_classes: int, transform: Any = None) -> None:
            self.size, self.image_size, self.classes = size, image_size, num_classes
            self.transform = transform or (lambda image: image)

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index >= self.size:
                raise IndexError(index)
            generator = torch.Generator().manual_seed(index)
            image = torch.rand(self.image_size, generator=generator)
            return self.transform(image), int(torch.randint(self.classes, (), generator=generator))

    class Compose:
        def __init__(self, steps: list[Any]) -> None:
            self.steps = steps

        def __call__(self, image: Tensor) -> Tensor:
            for step in self.steps:
                image = step(image)
            return image

    class Normalize:
        def __init__(self, mean: Any, std: Any) -> None:
            self.mean, self.std = (torch.tensor(x).reshape(-1, 1, 1) for x in (mean, std))

        def __call__(self, image: Tensor) -> Tensor:
            return (image - self.mean) / self.std

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models")
    root, datasets, transforms, models = modules = [types.ModuleType(name) for name in names]
    sys.modules.update(zip(names, modules, strict=True))
    root.datasets, root.transforms, root.models = datasets, transforms, models
    datasets.FakeData = FakeData
    transforms.Compose, transforms.Normalize, transforms.ToTensor = Compose, Normalize, lambda: lambda image: image
    models.resnet18 = models.densenet121 = models.mobilenet_v3_small = Network
    return True
