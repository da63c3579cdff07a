"""What the suite must say of each backend in `broken_backends`: the tests that must fail on it, and no others may."""

from dataclasses import dataclass, field, replace

from broken_backends import (
    FULL,
    MINIMAL,
    PARTS,
    SCALED,
    SCALED_CAPABILITIES,
    AcceptsEverything,
    AlignsCausalTopLeft,
    AssumesContiguousKeys,
    BreaksTheGraph,
    CompilesForEveryLength,
    ComputesGradientsUndeclared,
    ComputesInFloat32,
    CutsTheGraph,
    DoesNotTrainItsParameterWithoutLSE,
    DoesNotUndoItsShift,
    DropsTheMask,
    ForgetsTheScaleInParts,
    GivesAPartTheGradientsOfItsOwnSoftmax,
    GivesLSEByToken,
    GivesLSEInBaseTwo,
    GivesNaNInEmptyRows,
    GivesZeroLSEInEmptyRows,
    HalvesTheGradientOfKeys,
    HasABandwidthPerHead,
    HasStateOutsideTheStateDictWithoutLSE,
    IgnoresCausal,
    IgnoresMetadata,
    IgnoresScale,
    InvertsTheMask,
    IsNotDenseAtItsLimit,
    IsNotDeterministic,
    KeepsInputsOnItself,
    KeepsTheMask,
    LeaksAcrossTheBatch,
    LeavesComputeDtype,
    LeavesMemoryUnwritten,
    LosesThePartialTile,
    MetadataWithFunction,
    MetadataWithLength,
    MetadataWithoutDecorator,
    MixesHeads,
    MutatesItsInput,
    OverflowsOnLargeScores,
    QuantisesByAllHeads,
    QuantisesByTheBatch,
    ReadsMetadata,
    RefusesByAssertion,
    RefusesWithoutNames,
    ReturnsItsInput,
    RightImpl,
    Scaled,
    ScaledWithoutLSE,
    ShiftsByTheBatch,
    StrictImpl,
    SwallowsUnknownArguments,
    SwallowsUnknownInputs,
    SwapsCrossLengths,
    TakesTheMaskByPosition,
    TakesZeroScaleForDefault,
    TilesKeyHeads,
    WritesItsInputBack,
    bandwidth_lse,
    bandwidth_oracle,
    make_length_metadata,
    scaled_oracle,
)

from attnmux import AttentionMetadata, Capabilities


@dataclass(frozen=True)
class Broken:
    """A backend and what the suite must say of it.

    Attributes:
        impl: The wrong impl.
        fails: Tests that must fail.
        others_fail: Whether further tests may fail; for a fault that shows in every result.
        capabilities: What it declares.
        metadata: Class of its metadata.
        suite: Attributes of its conformance class.
    """

    impl: type
    fails: set
    others_fail: bool = False
    capabilities: Capabilities = FULL
    metadata: type = AttentionMetadata
    suite: dict = field(default_factory=dict)


NEEDS_METADATA = replace(FULL, needs_metadata=True)
WITH_METADATA = {"make_metadata": make_length_metadata}

VALUE_TESTS = {"test_output_equals_oracle", "test_odd_lengths", "test_strides_are_honoured"}
GRADIENT_TESTS = {
    "test_gradients_equal_oracle",
    "test_gradients_with_scale",
    "test_gradients_with_causal",
    "test_gradients_with_grouped_queries",
    "test_gradients_with_cross_lengths",
    "test_gradients_at_odd_lengths",
    "test_gradients_with_strides",
    "test_mask_gradients",
}
COMPILED = replace(FULL, compile="fullgraph")
REFUSAL_TESTS = {
    "test_undeclared_softmax_scale_is_refused",
    "test_undeclared_causal_is_refused",
    "test_undeclared_gqa_is_refused",
    "test_undeclared_head_size_is_refused",
    "test_unknown_constructor_argument_is_refused",
}

BROKEN_UNDER_COMPILE = [
    Broken(BreaksTheGraph, {"test_compiles_with_dynamic_length", "test_compiled_gradients"}, capabilities=COMPILED),
    Broken(CompilesForEveryLength, {"test_compiles_with_dynamic_length"}, capabilities=COMPILED),
]

RIGHT = [
    Broken(StrictImpl, set(), capabilities=MINIMAL),
    Broken(ScaledWithoutLSE, set(), capabilities=SCALED_CAPABILITIES, suite=SCALED),
    Broken(ReadsMetadata, set(), capabilities=NEEDS_METADATA, metadata=MetadataWithLength, suite=WITH_METADATA),
]

BROKEN = [
    Broken(IgnoresScale, {"test_softmax_scale_is_honoured", "test_gradients_with_scale"}),
    Broken(TakesZeroScaleForDefault, {"test_softmax_scale_is_honoured", "test_gradients_with_scale"}),
    Broken(
        IgnoresCausal,
        {
            "test_causal",
            "test_causal_cross_is_bottom_right",
            "test_gradients_with_causal",
            "test_mask_and_causal_combine",
            "test_lse",
        },
    ),
    Broken(AlignsCausalTopLeft, {"test_causal_cross_is_bottom_right"}),
    Broken(MutatesItsInput, {"test_inputs_are_not_modified"}, others_fail=True),
    Broken(WritesItsInputBack, {"test_inputs_are_not_modified"}, others_fail=True),
    Broken(IsNotDeterministic, {"test_same_input_gives_same_bits"}),
    Broken(
        DropsTheMask,
        {"test_mask", "test_mask_gradients", "test_mask_and_causal_combine", "test_empty_rows_have_lse_minus_infinity"},
    ),
    Broken(
        InvertsTheMask,
        {"test_mask", "test_mask_gradients", "test_mask_and_causal_combine", "test_empty_rows_have_lse_minus_infinity"},
    ),
    Broken(GivesNaNInEmptyRows, {"test_mask", "test_mask_gradients", "test_causal_cross_is_bottom_right"}),
    Broken(GivesLSEInBaseTwo, {"test_lse"}),
    Broken(GivesLSEByToken, {"test_lse", "test_empty_rows_have_lse_minus_infinity"}),
    Broken(GivesZeroLSEInEmptyRows, {"test_empty_rows_have_lse_minus_infinity"}),
    Broken(
        GivesAPartTheGradientsOfItsOwnSoftmax,
        {"test_parts_merge_to_the_whole", "test_parts_merge_under_every_option"},
        capabilities=PARTS,
    ),
    Broken(ForgetsTheScaleInParts, {"test_parts_merge_under_every_option"}, capabilities=PARTS),
    Broken(LeaksAcrossTheBatch, {"test_samples_are_independent"}, others_fail=True),
    Broken(QuantisesByTheBatch, {"test_samples_are_independent", "test_heads_are_independent"}),
    Broken(QuantisesByAllHeads, {"test_heads_are_independent"}),
    Broken(MixesHeads, {"test_head_permutation_is_equivariant", "test_heads_are_independent"}, others_fail=True),
    Broken(
        HasABandwidthPerHead,
        {"test_head_permutation_is_equivariant", "test_some_heads_are_those_of_all"},
        capabilities=replace(FULL, sequence_parallel=frozenset({"ulysses"})),
        suite={"oracle": bandwidth_oracle, "oracle_lse": bandwidth_lse},
    ),
    Broken(LeavesMemoryUnwritten, {"test_fresh_memory_is_written"}),
    Broken(LosesThePartialTile, {"test_odd_lengths", "test_gradients_at_odd_lengths"}),
    Broken(
        TilesKeyHeads,
        {"test_grouped_queries", "test_gradients_with_grouped_queries"},
        suite={"num_heads": 4},
    ),
    Broken(SwapsCrossLengths, {"test_cross_lengths", "test_gradients_with_cross_lengths"}),
    Broken(
        LeavesComputeDtype,
        {"test_output_form"},
        capabilities=replace(FULL, dtypes=frozenset({"float32", "float64"})),
    ),
    Broken(ReturnsItsInput, {"test_output_form"}),
    Broken(AssumesContiguousKeys, {"test_strides_are_honoured", "test_gradients_with_strides"}),
    Broken(OverflowsOnLargeScores, {"test_output_equals_oracle", "test_gradients_equal_oracle"}),
    Broken(ComputesInFloat32, VALUE_TESTS | GRADIENT_TESTS, others_fail=True),
    Broken(HalvesTheGradientOfKeys, GRADIENT_TESTS),
    Broken(CutsTheGraph, GRADIENT_TESTS, others_fail=True),
    Broken(SwallowsUnknownInputs, {"test_unknown_extra_input_is_refused"}),
    Broken(SwallowsUnknownArguments, {"test_unknown_constructor_argument_is_refused"}),
    Broken(TakesTheMaskByPosition, {"test_extra_inputs_are_keyword_only"}),
    Broken(KeepsInputsOnItself, {"test_threads_share_an_impl"}),
    Broken(KeepsTheMask, {"test_calls_leave_no_trace"}),
    Broken(ShiftsByTheBatch, {"test_preprocess_works_stacked"}, others_fail=True),
    Broken(DoesNotUndoItsShift, {"test_postprocess_undoes_preprocess"}, others_fail=True),
    Broken(Scaled, {"test_parameters_are_declared"}, suite={"oracle": scaled_oracle}),
    Broken(
        HasStateOutsideTheStateDictWithoutLSE,
        {"test_state_dict_round_trip", "test_layer_gives_the_result_of_the_impl", "test_dense_limit_equals_dense"},
        capabilities=SCALED_CAPABILITIES,
        suite=SCALED,
    ),
    Broken(DoesNotTrainItsParameterWithoutLSE, GRADIENT_TESTS, capabilities=SCALED_CAPABILITIES, suite=SCALED),
    Broken(IsNotDenseAtItsLimit, {"test_dense_limit_equals_dense"}, capabilities=SCALED_CAPABILITIES, suite=SCALED),
    Broken(
        RightImpl,
        {"test_inexact_backend_has_an_oracle", "test_dense_limit_equals_dense", "test_lse"},
        capabilities=replace(FULL, exactness="sparse"),
    ),
    Broken(
        RightImpl,
        {"test_metadata_survive_pickling"},
        metadata=MetadataWithFunction,
    ),
    Broken(RightImpl, {"test_metadata_as_dict"}, metadata=MetadataWithoutDecorator),
    Broken(
        IgnoresMetadata,
        {"test_missing_metadata_is_refused", "test_metadata_of_another_length_are_refused"},
        capabilities=NEEDS_METADATA,
        metadata=MetadataWithLength,
        suite=WITH_METADATA,
    ),
    Broken(RightImpl, {"test_capabilities_are_declared"}, capabilities=replace(FULL, exactness=None), others_fail=True),
    Broken(RightImpl, {"test_extra_inputs_are_keyword_only"}, capabilities=replace(FULL, extra_inputs=frozenset())),
    Broken(ComputesGradientsUndeclared, {"test_undeclared_backward_is_not_silent"}, capabilities=MINIMAL),
    Broken(RefusesWithoutNames, REFUSAL_TESTS, capabilities=MINIMAL),
    Broken(RefusesByAssertion, {"test_undeclared_causal_is_refused"}, capabilities=MINIMAL),
    Broken(
        AcceptsEverything,
        REFUSAL_TESTS
        | {
            "test_undeclared_dtype_is_refused",
            "test_undeclared_cross_lengths_are_refused",
            "test_undeclared_mask_is_refused",
            "test_undeclared_lse_is_refused",
            "test_unknown_extra_input_is_refused",
            "test_undeclared_backward_is_not_silent",
        },
        capabilities=MINIMAL,
    ),
]
