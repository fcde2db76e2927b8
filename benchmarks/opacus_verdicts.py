"""What is made of the outcome of Opacus' own tests on our engine: `opacus_suite.py` runs them."""

from __future__ import annotations

# (test, why it does not apply): `*` as in a file name; a test is "file::Class::name", files relative to opacus/tests.
NOT_APPLICABLE: list[tuple[str, str]] = [
    # Files that never come near an engine: pure functions and layers of Opacus, which we use as they are.
    ("accountants_test.py::*", "Opacus' accountants alone; ours are these"),
    ("prv_accountant.py::*", "Opacus' accountants alone; ours are these"),
    ("dp_layers/*", "Opacus' layers against torch's, without an engine; ours are these"),
    ("validators/*", "Opacus' validators alone; ours are these"),
    ("module_validator_test.py::*", "Opacus' validators alone; ours are these"),
    ("poisson_test.py::*", "Opacus' sampler alone; fused mode has its own (tests/test_sampling.py)"),
    ("distributed_poisson_test.py::*", "Opacus' distributed sampler alone"),
    ("dpdataloader_test.py::*", "Opacus' data loader and collate function alone"),
    ("randomness_test.py::DataLoader*", "Opacus' data loader and generator switch alone"),
    ("grad_samples/conv2d_test.py::Conv2d_test::test_unfold2d", "Opacus' unfold alone"),
    ("*::DPTensorArithmeticTest::*", "arithmetic of Opacus' lazy two-pass loss tensor, which one pass has no use for"),
    # Opacus' optimizer classes, built by hand on p.grad_sample.
    ("randomness_test.py::OptimizerRandomnessTest::*", "Opacus' DPOptimizer built by hand, without an engine"),
    ("accounting_noise_multiplier_test.py::*::test_adaclip_*", "AdaClipDPOptimizer built by hand, without an engine"),
    ("accounting_noise_multiplier_test.py::*::test_accountant_uses*", "AdaClipDPOptimizer built by hand"),
    ("accounting_noise_multiplier_test.py::*::test_comparison_*", "AdaClipDPOptimizer built by hand"),
    ("multidevice_optimizer_test.py::*", "Opacus' optimizers built by hand (and needs two GPUs)"),
    ("*::GradSampleModuleFastGradientClippingEmbeddingLayerTest::*", "drives ghost clipping's two passes by hand"),
    # Private attributes of Opacus' own hook classes.
    ("grad_sample_hooks_fast*::test_hooks_creation", "the attribute in which Opacus keeps its hook handles"),
    ("grad_sample_hooks_fast*::test_cleanup", "the attributes in which Opacus keeps its hook handles and counters"),
]

# (test, pattern of the error's first line, category, why). The first row that matches counts.
# Categories: "refused" (an input that ours does not take), "internal" (the test asserts an internal of Opacus),
# "difference" (ours, on purpose).
_SEEDED = "noise and coins come from the operating system's key, which torch.manual_seed does not repeat; "
EXPLAINED: list[tuple[str, str, str, str]] = [
    (
        "*::test_deterministic_run",
        "must match",
        "difference",
        _SEEDED + "PrivacyEngine(keystream=Keystream.seeded(n)) does. Passes with --key torch",
    ),
    (
        "batch_memory_manager_test.py::*::test_equivalent_to_one_batch",
        "False is not true",
        "difference",
        _SEEDED + "the test compares two runs' noise. Passes with --key torch",
    ),
    (
        "randomness_test.py::PrivacyEngineSecureModeTest::test_*",
        "False is not true",
        "difference",
        _SEEDED + "nor do Poisson coins come from the loader's generator, even where noise_generator is given",
    ),
    (
        "*::test_noise_level",
        "within .* delta",
        "difference",
        _SEEDED
        + "the squared norm of 160 draws leaves the test's 15 % for one key in six, with Opacus as with us: the "
        "test fixes a seed that does not",
    ),
    (
        "gradient_accumulation_test.py::*_zero_grad",
        "ValueError not raised",
        "difference",
        "a step takes what was captured: without zero_grad nothing is counted twice, and nothing need be refused",
    ),
    (
        "gradient_accumulation_test.py::*::test_grad_sample_accumulation",
        "",
        "difference",
        "reads the batch's ordinary gradient in p.grad: fused mode never forms it, as nothing un-noised may leave",
    ),
    (
        "grad_samples/conv2d_test.py::*::test_asymetric_dilation_and_kernel_size",
        "NoneType",
        "difference",
        "reads the batch's ordinary gradient in p.grad: fused mode never forms it, as nothing un-noised may leave",
    ),
    (
        "*::test_*able*",
        "has no attribute '(hooks_enabled|enable_hooks|disable_hooks)'",
        "difference",
        "enable_hooks() and disable_hooks(): switched off, the module would leave un-noised gradients in p.grad, "
        "which fused mode refuses; freeze the parameters instead",
    ),
    (
        "*::test_standard_module_validation",
        "False is not true",
        "internal",
        "asks for the attribute ft_compute_sample_grad, in which Opacus keeps its functorch fallback",
    ),
    (
        "privacy_engine_validation_test.py::*_hooks*",
        "False is not true",
        "internal",
        "asks for the attribute ft_compute_sample_grad, in which Opacus keeps its functorch fallback",
    ),
    (
        "privacy_engine_validation_test.py::*_ew",
        "RuntimeError not raised",
        "internal",
        "wants the mode ew to refuse the layer, which fused mode trains",
    ),
    (
        "*::test_privacy_accounting_with_adaclip_e2e",
        r"AssertionError: SGD \(",  # "is not an instance of" comes lines later
        "internal",
        "asserts that the optimizer is an AdaClipDPOptimizer",
    ),
    (
        "grad_samples/dp_rnn_test.py::*",
        "returns .* expected .* rows along",
        "refused",
        "a PackedSequence is refused by an error: its steps hold ever fewer records, in the order of their lengths (of "
        "an unsorted one Opacus takes the rows for the batch's own order, and a record exceeds the bound)",
    ),
    (
        "privacy_engine_test.py::PrivacyEngineText*::test_make_private_with_epsilon",
        "saw 12 records",
        "refused",
        "the test forgets batch_first=False, so that its 12 time steps stand where records should: refused by an error "
        "(Opacus takes each time step of the whole batch for a record)",
    ),
    (
        "grad_samples/embedding_bag_test.py::*",
        "EmbeddingBag has no per-sample rule",
        "refused",
        "EmbeddingBag with offsets is refused by an error (with two axes of indices it works)",
    ),
]
