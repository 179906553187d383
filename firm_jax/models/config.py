"""Reading a Hugging Face config.json strictly: every field is used, known to be without effect, or an error."""

from collections.abc import Collection, Mapping

from firm_jax.errors import ConfigError

# Bookkeeping that transformers and diffusers write into every config and that changes no arithmetic.
BOOKKEEPING = frozenset(
    """_class_name _diffusers_version _name_or_path architectures model_type torch_dtype dtype transformers_version
    return_dict output_hidden_states output_attentions return_unused_kwargs use_cache use_bfloat16 torchscript
    id2label label2id num_labels problem_type tokenizer_class prefix finetuning_task task_specific_params
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id chunk_size_feed_forward
    max_length min_length do_sample num_beams temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_beam_groups diversity_penalty num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens bad_words_ids early_stopping
    cross_attention_hidden_size tie_encoder_decoder pruned_heads tf_legacy_loss attn_implementation""".split()
)


def check_fields(
    raw: Mapping, what: str, *, used: Collection[str], fixed: Mapping[str, Collection] | None = None, ignored=()
) -> None:
    """ConfigError naming every field that is neither used, nor ignored, nor one of `fixed` with a supported value.

    `fixed`: field -> the values under which our arithmetic is right.
    """
    fixed = fixed or {}
    unknown = sorted(set(raw) - set(used) - set(fixed) - set(ignored) - BOOKKEEPING)
    if unknown:
        raise ConfigError(f"{what}: config fields that are not supported: {', '.join(unknown)}")
    for field, supported in fixed.items():
        if field in raw and raw[field] not in supported:
            raise ConfigError(f"{what}: {field}={raw[field]!r} is not supported; supported: {list(supported)}")


def require(raw: Mapping, field: str, what: str):
    """A field without which the network cannot be built; ConfigError when it is absent or null."""
    if raw.get(field) is None:
        raise ConfigError(f"{what}: config.json lacks {field}")
    return raw[field]
