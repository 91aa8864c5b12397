"""What `make test` leaves to `make test-all`: of families of tests that differ in a parameter, so
many run in both, evenly spaced (a number that does not divide the family's, so that every value of
every parameter comes up); 0: none, another test of the fast suite fails for the same kind of
fault. `experiments/benchmarks/faults.py` measures what that costs.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

KEPT = {
    # processes of their own, which each import everything; one training on two of them is kept
    "test_soco_runs.py::test_two_processes_train_as_one": 1,
    "test_soco_runs.py::test_a_killed_sharded_training_goes_on": 0,
    "test_recovery.py::test_two_processes_train_as_one": 0,
    "test_scales.py::test_two_processes_train_as_one": 0,
    "test_scales.py::test_scales_move_and_integers_stay": 3,
    "test_scaled.py::test_what_is_stored_is_priced_and_comes_back": 3,
    "test_search.py::test_an_allocation_that_measures_sees_the_dense_model": 0,
    "test_search.py::test_steps_between_budgets_do_not_stop_a_search": 1,
    "test_search.py::test_what_is_promised_is_measured": 1,
    "test_scales.py::test_any_row_may_be_trained_so_and_its_folder_is_the_model": 1,
    "test_scales.py::test_a_killed_training_goes_on_to_the_same_bits": 1,
    "test_two_sided.py::test_any_row_may_be_rounded_so": 4,
    "test_two_sided.py::test_it_is_gptq_of_the_whole_hessian": 11,
    "test_sharded_calibration.py::test_two_processes_calibrate_as_one": 0,
    "test_sharded_calibration.py::test_what_follows_the_order_of_the_samples_is_left_to_one_process": 0,
    "test_sharded.py::test_two_processes": 0,
    "test_robustness.py::test_killed_experiment_ends_with_the_same_table": 0,
    "test_robustness.py::test_killed_while_statistics_are_written": 0,
    "test_robustness.py::test_three_processes_at_once": 0,
    "test_profile.py::test_every_stage_is_traced": 0,
    "test_stages.py::test_trials_of_grids_by_processes_are_those_of_one": 0,
    "test_dashboard.py::test_with_the_real_package_and_a_server": 0,
    "test_wandb_service.py::test_a_server_that_goes_away_in_the_middle": 0,
    "test_wandb_service.py::test_without_a_server_a_sweep_waits_once_and_stores_everything": 0,
    "test_experiments.py::test_a_sweep_in_a_process_of_its_own": 0,
    "test_export.py::test_import_specomp_is_enough_in_any_order": 1,
    "test_export.py::test_loads_bit_for_bit_without_specomp_when_the_code_in_the_folder_is_trusted": 1,
    "test_notebooks.py::test_runs": 0,
    # the real model: `make demo` runs it too
    "test_real.py::test_smollm2": 0,
    # every experiment and every model once; the product in the slow suite
    "test_experiments.py::test_every_experiment_composes_for_every_model": 24,
    "test_experiments.py::test_every_swept_value_makes_a_valid_experiment": 6,
    "test_experiments.py::test_committed_tables_and_reports_come_from_committed_records": 3,
    "test_experiments.py::test_published_cells_belong_to_the_sweep": 2,
    # methods x models x forms: some of each
    "test_methods.py::test_contract": 11,
    "test_methods.py::test_every_method_can_be_packed_pivoted": 4,
    "test_methods.py::test_the_same_seed_gives_the_same_ranks_and_weights": 4,
    "test_methods.py::test_global_allocation_uses_its_budget_and_loses_less_than_uniform_ranks": 2,
    "test_methods.py::test_our_rows_in_other_architectures": 2,
    "test_api.py::test_a_run_and_a_call_end_in_the_same_bits": 6,
    "test_route.py::test_a_run_does_what_its_plan_says": 15,
    "test_packed.py::test_reloads_bit_for_bit_and_is_as_large_as_counted": 17,
    "test_export.py::test_factors_reload_bit_for_bit_with_plain_transformers": 33,
    "test_quantization.py::test_contract": 5,
    "test_quantization.py::test_the_gram_is_there_for_every_method": 2,
    "test_streaming.py::test_a_streamed_run_makes_the_same_folder": 4,
    "test_streaming.py::test_slots": 2,
    "test_soco_runs.py::test_a_killed_training_goes_on_to_the_same_bits": 4,
    "test_soco_runs.py::test_the_saved_folder_is_the_model": 1,
    "test_soco_runs.py::test_what_a_cached_training_depends_on": 4,
    "test_recovery.py::test_the_model_comes_closer_to_the_dense_one": 2,
    "test_recovery.py::test_a_killed_recovery_goes_on_to_the_same_bits": 1,
    "test_pipeline.py::test_the_key_depends_on": 10,
    "test_pipeline.py::test_the_key_does_not_depend_on": 6,
    "test_pipeline.py::test_every_activation_method_runs_on_compressed_inputs": 2,
    "test_plan.py::test_every_method_has_a_plan": 5,
    "test_plan.py::test_a_hub_model_needs_no_hub": 1,
    "test_readme.py::test_commands_compose": 20,
    "test_configs.py::test_every_slot_choice_fits_into_every_method": 7,
    "test_stages.py::test_any_number_of_layers_at_once_gives_the_same_statistics": 3,
    "test_configs.py::test_every_choice_composes_and_builds_without_a_network": 29,
    "test_configs.py::test_the_library_reads_every_slot_choice_as_hydra_does": 9,
    "test_configs.py::test_the_library_reads_every_row_as_hydra_does": 5,
    "test_bad_input.py::test_what_was_typed": 23,
    "test_bad_input.py::test_state_of_files": 12,
    "test_bad_input.py::test_damaged_cache_is_recomputed_and_said": 3,
    "test_bad_input.py::test_damaged_record_is_made_again": 2,
    "test_block_refine.py::test_one_rate_serves_decoder_layers_that_are_nearly_right_and_far_off": 1,
    "test_block_refine.py::test_it_brings_the_model_closer": 2,
    "test_streaming.py::test_refusals": 3,
    "test_streaming.py::test_runs_from_ways_to_store_a_model": 1,
    "test_streaming.py::test_an_interrupted_run_leaves_nothing_and_can_be_repeated": 1,
    "test_soco_runs.py::test_killed_between_two_forward_passes_of_a_step": 1,
    "test_soco_runs.py::test_killed_after_the_last_checkpoint": 1,
    "test_soco_runs.py::test_killed_before_the_result_was_stored": 1,
    "test_soco_runs.py::test_packed_factors_are_the_weights_of_the_training": 2,
    "test_export.py::test_generation_with_cache_equals_without_and_padding_changes_nothing": 6,
    "test_export.py::test_dense_form_equals_factors_and_is_an_ordinary_model": 6,
    "test_streaming.py::test_a_streamed_model_is_the_model": 7,
    "test_dashboard.py::test_the_command": 1,
    "test_gguf_export.py::test_the_file_gives_back_the_merged_model_as_its_type_rounds_it": 4,
    "test_gridded.py::test_mixed_forms_in_one_folder_are_as_large_as_counted_and_come_back": 1,
    "test_gridded.py::test_a_budget_of_bits_is_met_from_below": 1,
    "test_soco_runs.py::test_keeping_everything_is_the_dense_model": 3,
}


def left_out(ids: Sequence[str]) -> Iterator[int]:
    """Places in a list of test ids, as collected, of those that are not in the fast suite."""
    families: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(ids):
        families[name.split("[")[0].rpartition("/")[2]].append(place)
    for family, kept in KEPT.items():
        places = families.get(family, [])
        stay = {(2 * i + 1) * len(places) // (2 * kept) for i in range(kept)}
        yield from (place for i, place in enumerate(places) if i not in stay)
