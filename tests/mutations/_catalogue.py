"""The planted bugs: wrong rewrites that a hurried change could make, as source patches."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

__all__ = ["MUTATIONS", "Mutation"]


@dataclass(frozen=True)
class Mutation:
    """One planted bug."""

    name: str
    file: str
    """Path from the root of the repository."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest: the fast tests that have to notice."""

    @property
    def area(self) -> str:
        """The file's name: which pass is wrong."""
        return self.file.rsplit("/", 1)[-1].removesuffix(".py")


P = "tests/passes/test_"
FIND, NEGATIVE = f"{P}find_attention_transformers.py", f"{P}find_attention_negative.py"
LIBRARY, CHECKPOINTS = f"{P}library_kernels.py", f"{P}inline_regions.py"
DOORS_OPEN = "tests/e2e/test_front_doors.py"
OPAQUE = "tests/e2e/test_attention_kernels.py"
SPLICED, REMOTE = "tests/avl_fx/test_spliced_rows.py", "tests/e2e/test_remote_code.py -m 'not matrix'"
AUTOCAST, GRADIENTS = f"{P}find_attention_autocast.py", f"{P}find_attention_gradients.py"
DESCRIBE = f"{P}describe.py"
SPELLINGS, UNREPEAT, SHARE = f"{P}find_attention_properties.py", f"{P}unrepeat.py", f"{P}share_queries.py"
PIECES = "tests/e2e/test_decoder_in_pieces.py -k mlp"
REUSED = "tests/e2e/test_reused_outputs.py"
SEVERAL = "tests/e2e/test_several_modalities.py -m 'not matrix'"
HOOK, TOKEN_IDS = "tests/avl_fx/test_modality_hook.py", "tests/avl_fx/test_token_ids.py"
LOCATE, LOWER, VERIFY, REWRITE, NODES = (
    f"{P}{n}.py" for n in ("locate_modalities", "lower", "verify", "rewrite", "nodes")
)
KERNEL, DROPPED = "tests/kernels/test_attention.py", "tests/avl_fx/test_dropped_keys.py"
APPEND, NARROW, GROWN = f"{P}append_in_place.py", f"{P}narrow_linears.py", "tests/avl_fx/test_growing.py"
GROWING = "tests/e2e/test_growing_cache.py -m 'not full'"
READS = "tests/avl_fx/test_reads.py -k 'hand or ranges'"
ONCE = f"{P}read_once.py"
ABSORB, LATENT = f"{P}absorb_latents.py", "tests/e2e/test_latent_attention.py -m 'not matrix'"
LATENT_KERNEL = "tests/kernels/test_latent_decode.py -k native"
TILES = "tests/kernels/test_partitioned_decode.py -k 'native and whole_tiles'"
DECODE = "tests/kernels/test_partitioned_decode.py -k 'native and (is_stored or is_seen)'"
MOVES = "tests/kernels/test_partition.py"
RESELECT, ALIKE = "tests/kernels/test_reselect.py", f"{MOVES} -k laid_out_alike"
ZONES = "tests/avl_fx/test_zones.py"
STATE, AVL = "tests/avl_fx/test_partition.py", "tests/e2e/test_avl.py -m 'not matrix'"
CAUSAL = "tests/e2e/test_causal_encoder.py"
REWOUND = "tests/e2e/test_rewound_static_cache.py"
OBSERVE, BLOCKS, CALIBRATE = f"{P}observe_attention.py", "tests/avl_fx/test_blocks.py", "tests/avl_fx/test_calibrate.py"
MODES = "tests/e2e/test_lazy_modes.py -m 'not matrix'"
SPREAD, SECOND = "tests/passes/test_spread_keys.py", "tests/e2e/test_lazy_modes.py -k second_turn_on_a_compact"
RESOLVE, STORED, COMPACT = f"{P}resolve_rows.py", "tests/avl_fx/test_stored_rows.py", "tests/e2e/test_compact_cache.py"


ADDS, EXPERTS = f"{P}add_features.py", f"{P}expert_rows.py"
FEWER, FILTER = f"{P}fewer_rows.py", "tests/e2e/test_prefill_filter.py -m 'not matrix'"
NARROW_LINEAR, OPERATORS = "tests/kernels/test_narrow_linear.py", "tests/kernels/test_operators.py"
SURVIVORS = "tests/kernels/test_survivors.py"
SHARDED, PARALLEL = f"{P}sharded_heads.py", "tests/e2e/test_tensor_parallel.py"
WRAPPED, QUANTISED = "tests/e2e/test_wrapped_model.py", "tests/e2e/test_quantised_weights.py"


def _in(file: str, *mutations: tuple[str, str, str, str]) -> list[Mutation]:
    return [Mutation(name, file, old, new, tuple(shlex.split(tests))) for name, old, new, tests in mutations]


MUTATIONS: list[Mutation] = [
    *_in(
        "passes/find_attention.py",
        (
            "let gradients through what ran without",
            "if any(map(loses_gradient, _replaced(anchor, kept))):",
            "if False:",
            f"{GRADIENTS} -k without",
        ),
        (
            "drop the mask",
            "query, key, value, mask, site.scale, is_causal, site.index",
            "query, key, value, None, site.scale, is_causal, site.index",
            f"{FIND} -k 'additive and dynamic'",
        ),
        (
            "call everything unmasked causal",
            "query, key, value, mask, site.scale, is_causal, site.index",
            "query, key, value, mask, site.scale, mask is None, site.index",
            f"{FIND} -k 'none and decode'",
        ),
        (
            "swap keys and values",
            "query, key, value, mask, site.scale, is_causal, site.index",
            "query, value, key, mask, site.scale, is_causal, site.index",
            f"{FIND} -k 'additive and dynamic'",
        ),
        (
            "forget an explicit scale",
            "1.0 / math.sqrt(site.head_dim) if scale is None else scale",
            "1.0 / math.sqrt(site.head_dim)",
            f"{SPELLINGS} -k 'one_change and scale'",
        ),
        ("let active dropout pass", "if const(dropout) != 0.0:", "if False:", f"{NEGATIVE} -k 'active_dropout'"),
        (
            "read operands after they were written",
            "if any(tensor is not None and written_between(tensor, since, anchor) for tensor, since in readings):",
            "if False:",
            f"{NEGATIVE} -k 'left_alone and written'",
        ),
        (
            "take keys that are broadcast over the batch",
            "if not (same_size(qb, kb) and same_size(qb, vb)):",
            "if False:",
            f"{NEGATIVE} -k 'left_alone and broadcast'",
        ),
        (
            "ignore what autocast makes of the result",
            "for x in (query, key, value, anchor)]",
            "for x in (query, key, value)]",
            f"{NEGATIVE} -k 'autocast'",
        ),
        (
            "cast nothing under autocast",
            "if computed is not None:",
            "if False:",
            f"{AUTOCAST} -k 'around and float32-float32-bfloat16'",
        ),
        (
            "take what a softmax was given for what autocast would cast",
            'site.style == "sdpa" and result in half',
            "result in half",
            f"{AUTOCAST} -k softmax",
        ),
    ),
    *_in(
        "passes/softmax_pattern.py",
        (
            "ignore other users of the weights",
            "if len(current.users) > 1 or used_elsewhere:",
            "if False:",
            f"{NEGATIVE} -k 'left_alone and weights'",
        ),
        (
            "let cut weights be all",
            "            if cut:\n",
            "            if False:\n",
            f"{NEGATIVE} -k 'left_alone and (sinks or narrowed)'",
        ),
        (
            "take any maximum off",
            "return maximum if over_keys and alone and",
            "return maximum if",
            f"{NEGATIVE} -k 'left_alone and maximum'",
        ),
        (
            "take the maximum of something else off",
            " and maximum.args[0] is logits else None",
            " else None",
            f"{NEGATIVE} -k 'left_alone and maximum'",
        ),
        ("forget the scale", "            scale *= factor\n", "", f"{FIND} -k 'eager and dynamic'"),
        (
            "divide by multiplying",
            "1.0 / factor if divides else factor",
            "factor",
            f"{SPELLINGS} -k 'one_change and div'",
        ),
        (
            "let a mask be scaled",
            "if mask is None and _mask_below(current):",
            "if False:",
            f"{NEGATIVE} -k 'left_alone and scaled'",
        ),
        (
            "invert a filled mask",
            'shown = visible if visible is not None else insert_call(output, "logical_not", hidden)',
            "shown = visible if visible is not None else hidden",
            f"{SPELLINGS} -k 'one_change and softmax-masking'",
        ),
        (
            "take any softmax dimension",
            "if not isinstance(dim, int) or dim % rank != rank - 1:",
            "if False:",
            f"{NEGATIVE} -k 'left_alone and softmax_over'",
        ),
        (
            "hide with a finite fill as with -inf",
            'if fill == float("-inf"):',
            "if True:",
            f"{SPELLINGS} -k 'one_change and softmax-masking'",
        ),
        (
            "let active dropout pass",
            "if rate != 0.0 and arg(current, 2",
            "if False and arg(current, 2",
            f"{NEGATIVE} -k 'active_dropout'",
        ),
        (
            "add the first of two masks",
            "            if mask is not None:\n"
            '                raise Refusal(Reason.MASK, "more than one mask", value)\n'
            "            current, source, mask = _filled",
            "            current, source, mask = _filled",
            f"{NEGATIVE} -k 'left_alone and two'",
        ),
        (
            "take added truth values for a mask",
            "if not fake(bias).dtype.is_floating_point:",
            "if False:",
            f"{NEGATIVE} -k 'left_alone and truth_values'",
        ),
        (
            "guess the dimension of a softmax",
            'dim = arg(node, 1, "dim")',
            'dim = arg(node, 1, "dim", -1)',
            f"{NEGATIVE} -k 'left_alone and guesses'",
        ),
        (
            "forget where the mask was read",
            "scale, mask or (lambda: None), source)",
            "scale, mask or (lambda: None))",
            f"{NEGATIVE} -k 'left_alone and hidden_positions'",
        ),
        (
            "let gradients through a finite fill",
            'if fill != float("-inf") and fake(node).requires_grad:',
            "if False:",
            f"{GRADIENTS} -k filled",
        ),
        (
            "take quantised logits",
            "if name in _CASTS and fake(current).dtype.is_floating_point:",
            "if name in _CASTS:",
            f"{NEGATIVE} -k 'left_alone and quantised'",
        ),
        (
            "take soft-capped logits",
            'elif name == "tanh":\n            raise Refusal(Reason.SOFTCAP, "", value)',
            'elif name == "tanh":\n            current = current.args[0]',
            f"{NEGATIVE} -k 'left_alone and soft_capped'",
        ),
    ),
    *_in(
        "passes/unrepeat.py",
        (
            "take tiled heads for repeated ones",
            "dim % (rank + 1) == 2 else None",
            "dim % (rank + 1) in (1, 2) else None",
            UNREPEAT,
        ),
        ("take any interleaved dimension", "and rank == 4 and dim % rank == 1:", "and rank == 4:", UNREPEAT),
        (
            "forget the slice after the repeat",
            "return insert_call(before, operator.getitem, source, index)",
            "return source",
            UNREPEAT,
        ),
        (
            "see through nothing",
            "return _expanded_source(node) or _interleaved_source(node) or node",
            "return node",
            UNREPEAT,
        ),
    ),
    *_in(
        "passes/describe.py",
        (
            "call chunked attention full",
            "    declared = _declared_kind(module, layer)\n",
            "    declared = None\n",
            f"{DESCRIBE} -k other_kinds",
        ),
        (
            "ignore sliding windows",
            "if slides is True or",
            "if False or",
            f"{SHARE} -k 'differs'",
        ),
        (
            "take the size of a window for one",
            "(slides is not False and isinstance(",
            "(isinstance(",
            f"{DESCRIBE} -k sliding_windows",
        ),
        (
            "take a causal encoder for a decoder",
            "    if known is not None and (module is not None or not known):\n",
            "    if False:\n",
            f"{DESCRIBE} -k looks",
        ),
        (
            "take a prefix that sees itself whole for an encoder",
            "if known is not None and module in known:",
            "if False:",
            f"{DESCRIBE} -k looks",
        ),
        (
            "know nothing of a frame that calls no module",
            "module_path(anchor) or _frame_itself(ctx)",
            "module_path(anchor)",
            "tests/e2e/test_decoder_in_pieces.py -k q_proj",
        ),
        (
            "take whatever a decoder attends to for tokens",
            "if shows or declared is not None else",
            "if True else",
            f"{DESCRIBE} -k something_else",
        ),
        ("call latent attention cross", "if apart and not (", "if apart or (", f"{DESCRIBE} -k latents"),
        ("call another layer's keys another sequence's", "None if shared else key", "key", f"{DESCRIBE} -k earlier"),
        (
            "count layers by the first number",
            "site.layer = int(parts[indices[-1]])",
            "site.layer = int(parts[indices[0]]) + 1",
            SHARE,
        ),
    ),
    *_in(
        "avl_fx/backend.py",
        ("make no room for pieces", "        if factor > 1:\n", "        if False:\n", PIECES),
    ),
    *_in(
        "avl_fx/_compat.py",
        ("forget how many pieces there are", "(watched.pieces if watched else 1)", "1", PIECES),
    ),
    *_in(
        "passes/share_queries.py",
        (
            "inherit from the wrong layer",
            "by_layer.get(anchor_layer, [])",
            "by_layer.get(anchor_layer - 1, [])",
            SHARE,
        ),
        (
            "send those who loop to the other front door",
            "if len(candidates) > 1:",
            "if False:",
            f"{SHARE} -k runs_twice",
        ),
        (
            "mix keys that another layer reads",
            "                refusal = _read_by_others(site, ctx)\n",
            "                pass\n",
            f"{SHARE} -k in_its_own_way",
        ),
        (
            "inherit from copies of what is stored",
            "    if _copies(site):\n",
            "    if False:\n",
            f"{SHARE} -k copies",
        ),
        (
            "take what is made of latents for copies",
            " or op(node) in _PRODUCTS:\n            continue",
            ":\n            continue",
            f"{SHARE} -k copies",
        ),
        ("inherit queries alone", "    site.node.update_arg(_KEY, anchor.node.args[_KEY])\n", "", SHARE),
        ("ignore another mask", 'return Reason.ANCHOR_MASK, ""', "pass", f"{SHARE} -k 'alone and mask'"),
        (
            "ignore another scale",
            "if site.node.args[_SCALE] != anchor.node.args[_SCALE]:",
            "if False:",
            f"{SHARE} -k 'alone and scale'",
        ),
        ("ignore another geometry", "if own != theirs:", "if False:", f"{SHARE} -k 'alone and heads'"),
        (
            "read the anchor's keys after they were written",
            "if any(written_between(tensor, anchor.node.next, site.node) for tensor in read):",
            "if False:",
            f"{SHARE} -k 'must_not_change'",
        ),
    ),
    *_in(
        "passes/substitute_visual.py",
        (
            "substitute everywhere but there",
            "flags[:, None, :, None], theirs, own)",
            "flags[:, None, :, None], own, theirs)",
            f"{MODES} -k 'equals_the_oracle and vla and not scores and not inductor'",
        ),
        (
            "substitute keys alone",
            "    site.node.update_arg(_QUERY, query)\n",
            "",
            f"{MODES} -k 'equals_the_oracle and vla and not scores and not inductor'",
        ),
        (
            "guess where nothing is known",
            "if flags is None:\n                result.refuse(site, Reason.VISUAL_UNKNOWN)\n                continue",
            "if flags is None:\n                continue",
            f"{P}visual_inputs.py -k behind_the_first",
        ),
        ("refuse a later turn of text", "if flags is None and _continues(ctx, site):", "if False:", SECOND),
    ),
    *_in(
        "passes/inherit_scores.py",
        (
            "read own keys for the anchor's",
            "anchor_key=theirs)",
            "anchor_key=key)",
            "tests/e2e/test_lazy_modes.py -k 'second_turn_on_a_compact_cache and vla-'",
        ),
        (
            "inherit text instead of images",
            "own.masked_fill(visual, 0.0), theirs.masked_fill(torch.logical_not(visual), 0.0)",
            "own.masked_fill(torch.logical_not(visual), 0.0), theirs.masked_fill(visual, 0.0)",
            f"{MODES} -k 'second_turn and vla_scores'",
        ),
        (
            "add the anchor's products to the layer's own",
            "own.masked_fill(visual, 0.0)",
            "own",
            f"{MODES} -k 'second_turn and vla_scores'",
        ),
        (
            "inherit every logit of a step",
            "new_value, mask, segments, inherited)",
            "new_value, mask, segments, segments)",
            f"{MODES} -k 'second_turn and vla_scores'",
        ),
        (
            "inherit from an anchor that reads other keys",
            "same = all(node.args[i] is anchor.args[i] for i in shared)",
            "same = True",
            f"{P}inherit_scores.py",
        ),
    ),
    *_in(
        "passes/visual_inputs.py",
        (
            "forget what was visual before",
            "earlier = insert_traced(node, _flags, past, root.args[0][0])",
            "earlier = insert_traced(node, _flags, insert_call(node, torch.zeros_like, past), root.args[0][0])",
            f"{MODES} -k 'second_turn and vla_scores'",
        ),
        (
            "use positions before they are there",
            " or not shown < first:",
            ":",
            f"{P}visual_inputs.py -k behind_the_first",
        ),
        (
            "take ranges one too long",
            "torch.lt(torch.sub(positions, start), length)",
            "torch.le(torch.sub(positions, start), length)",
            "tests/avl_fx/test_visual_calls.py",
        ),
    ),
    *_in(
        "avl_fx/visual_calls.py",
        (
            "give a piece of a prompt what the whole has",
            "visual = given_rows(queries, tokens)",
            "visual = given_rows(queries, 0)",
            "tests/avl_fx/test_visual_calls.py",
        ),
    ),
    *_in(
        "passes/drop_keys.py",
        (
            "let go of keys that something else reads",
            "        if target is None:\n            return None\n",
            "        if target is None:\n            continue\n",
            f"{SHARE} -k 'alone and norm'",
        ),
        (
            "let go of buffers that something else reads",
            "return [root] if not readers(root) else None",
            "return [root]",
            f"{SHARE} -k 'buffer or another_layer'",
        ),
        (
            "put a marker where none fits",
            "if not _marker_fits(returned[emptied[0]], returned[like[0]], head_dim):",
            "if False:",
            f"{SHARE} -k 'no_marker'",
        ),
        ("keep writing keys that nothing reads", "    removable += buffers\n", "", SHARE),
    ),
    *_in(
        "avl_fx/runtime.py",
        (
            "give what stands for keys the dtype of values",
            "drop.head_dim, shared, drop.dtype)",
            "drop.head_dim, shared)",
            "tests/e2e/test_autocast.py -k two_dtypes",
        ),
        (
            "forget what an earlier graph spliced in",
            "            visual = visual | earlier.to(visual.device)  # images in one graph, videos in the next\n",
            "            pass\n",
            SEVERAL,
        ),
        (
            "let what rode on a tensor ride on at the next call of a CUDA graph",
            "        if self.returns_the_same:\n            _let_nothing_ride",
            "        if False:\n            _let_nothing_ride",
            REUSED,
        ),
        (
            "let visual positions ride on at the next call of a CUDA graph",
            "            modality.detach(tensor)\n",
            "",
            REUSED,
        ),
        (
            "let the state of a cache ride on at the next call of a CUDA graph",
            "            partition.detach(tensor)\n",
            "",
            REUSED,
        ),
        (
            "let positions ride on that the next call of a CUDA graph writes over",
            "visual = visual.clone()",
            "pass",
            REUSED,
        ),
        (
            "count what several graphs of a forward splice in as several forwards",
            "recorder.saw_visual(seen, earlier, given())",
            "recorder.saw_visual(seen, given())",
            SEVERAL,
        ),
    ),
    *_in(
        "passes/visual_inputs.py",
        (
            "lazy layers inherit at what their own graph splices in alone",
            "        inputs.flags, inputs.shown = shown, _may_ride(gm, wanted[0], wanted[2])",
            "        inputs.flags, inputs.shown = shown, False",
            SEVERAL,
        ),
    ),
    *_in(
        "avl_fx/visual_calls.py",
        (
            "mix what the user gave with what a graph shows",
            "if visual is None and not self.shown:",
            "if visual is None:",
            "tests/avl_fx/test_visual_calls.py",
        ),
        (
            "a graph that shows its own positions is told them",
            "told = self.takes_new and not self.shown",
            "told = self.takes_new",
            "tests/avl_fx/test_visual_calls.py",
        ),
    ),
    *_in(
        "avl_fx/modality.py",
        ("take audio for images, by their types", " & (ids != _AUDIO_TYPE)", "", HOOK),
    ),
    *_in(
        "avl_fx/regions.py",
        (
            "ask the whole for token ids, whose forward is never called",
            "for module in generating for handle in ModalityHook",
            "for module in wrapping(model) for handle in ModalityHook",
            SEVERAL,
        ),
    ),
    *_in(
        "avl_fx/record.py",
        (
            "count what is shown and given as two forwards",
            "[*self.visual, *self._replaced]",
            "self.visual",
            "tests/avl_fx/test_record.py",
        ),
    ),
    *_in(
        "avl_fx/token_ids.py",
        ("one placeholder for images and audio is audio", " - visual_token_ids(config)", "", TOKEN_IDS),
        ("ask the configuration itself alone", "for part in _parts(config)))", "for part in ()))", TOKEN_IDS),
        ("ask no part for images that nobody lists", ', "vision_config")', ",)", HOOK),
    ),
    *_in(
        "passes/locate_modalities.py",
        (
            "take audio for images",
            "if m is not None and m not in audio)",
            "if m is not None)",
            LOCATE,
        ),
        (
            "take images for audio where one mask has both",
            "found.issuperset(operands)",
            "not found.isdisjoint(operands)",
            LOCATE,
        ),
        ("look past what is written into a mask of audio", "if same and not writes_to(node):", "if same:", LOCATE),
        ("take a mask for one of audio for want of arguments", "len(operands) == 2 and ", "", LOCATE),
        (
            "forget masks of audio that an earlier graph made",
            "if position in ctx.audio_masks}",
            "if False}",
            LOCATE,
        ),
        (
            "do not say which outputs are masks of audio",
            "    ctx.returned_audio_masks = tuple(",
            "    _ = tuple(",
            LOCATE,
        ),
        (
            "look through negations",
            "    if name in VIEW_OPS:",
            '    if name in VIEW_OPS or name == "bitwise_not":',
            LOCATE,
        ),
        (
            "take padding for images",
            "    if len(shape(node.args[2]) or ()) + len(shape(mask) or ()) != 4:",
            "    if False:",
            LOCATE,
        ),
        ("take halves of experts for images", "op(alias_root(target)) in _FILLS or", "", f"{LOCATE} -k halves"),
        ("take assigned text for images", " or op(mask) in _NEGATIONS:", ":", f"{LOCATE} -k text_assigned"),
        ("intersect images and videos", "torch.logical_or, union, row", "torch.logical_and, union, row", LOCATE),
        ("take zeroed tokens for images", "and op(b) not in _FILLS for b in branches", "for b in branches", LOCATE),
        (
            "take one mask for several where each layer moves it",
            "dict.fromkeys(map(_moved, spliced))",
            "dict.fromkeys(spliced)",
            f"{P}visual_inputs.py -k one_mask",
        ),
        ("ask a mask before it is written to", " and not written", "", f"{LOCATE} -k guessed"),
    ),
    *_in(
        "passes/lower.py",
        (
            "forget the mask",
            "arguments = query, key, value, mask, scale, is_causal",
            "arguments = query, key, value, None, scale, is_causal",
            f"{FIND} -k 'additive and dynamic'",
        ),
        ("forget the layout", 'if site.style == "softmax" and _layout_matters(node):', "if False:", LOWER),
        ("sweep the visual positions away", "keep=ctx.keep()", "keep=()", LOCATE),
    ),
    *_in(
        "passes/finish_outputs.py",
        ("leave gaps in the outputs", "if i not in emptied]", "]", SHARE),
        ("keep the visual positions to itself", "returned + ctx.returned()", "returned", LOCATE),
    ),
    *_in(
        "passes/verify.py",
        ("let writes go", "not in result.added_mutations) != allowed:", "in ()) not in ((), allowed):", VERIFY),
        (
            "believe what a stage says it dropped",
            "if write not in facts.writes and target not in dropped:",
            "if False:",
            VERIFY,
        ),
        ("let canonical nodes survive", 'if stage in ("lower", "finish_outputs"):', "if False:", VERIFY),
        ("let sites get lost", "if site.node is not None and site.node not in nodes:", "if False:", VERIFY),
        ("let repeated keys pass", "if is_repeated(key) and is_repeated(value):", "if False:", VERIFY),
        ("trust recorded shapes", "if [str(s) for s in recorded.shape] != [str(s) for s in expected] or", "if", VERIFY),
    ),
    *_in(
        "passes/rewrite.py",
        (
            "remove live writes to inputs",
            "if writes[node] & outside:",
            "if False:",
            REWRITE,
        ),
        (
            "take what is looked up by for unread",
            "return [used for used in node.all_input_nodes if used is not source]",
            "return []",
            f"{REWRITE} -k advanced",
        ),
        ("remove writes that are read later", "if writes[node] & read:", "if False:", REWRITE),
        (
            "never remove a buffer's writes",
            "outside = frozenset().union(*map(places, inputs)) - given_up",
            "outside = frozenset().union(*map(places, inputs))",
            REWRITE,
        ),
        (
            "remove what never had users",
            "elif node in initially_unused or node in keep:",
            "elif node in keep:",
            REWRITE,
        ),
        (
            "forget the origin of new nodes",
            "    for key in _COPIED:",
            "    for key in ():",
            REWRITE,
        ),
        ("forget that a region is checkpointed", ', "recompute", "ac_graph_id")', ")", f"{CHECKPOINTS} -k kept"),
    ),
    *_in(
        "passes/nodes.py",
        ("take & for a write", '    operator.and_: "bitwise_and",\n', "", NODES),
        (
            "miss writes through views",
            "        elif op(seen) in VIEW_OPS and isinstance(",
            "        elif False and isinstance(",
            NODES,
        ),
        (
            "miss writes to memory that no name tells of",
            "return frozenset({root} if memory is None else {root, memory})",
            "return frozenset({root})",
            f"{REWRITE} -k no_name",
        ),
        (
            "miss writes that an argument asks for",
            'if switch is not None and arg(node, switch, "inplace"):',
            "if False:",
            f"{NODES} -k in_place_writes",
        ),
        (
            "miss writes to lists",
            'own_name = not name.startswith("_") or name.startswith("_foreach_")',
            'own_name = not name.startswith("_")',
            f"{NODES} -k in_place_writes",
        ),
        (
            "trust views about gradients",
            "return not value.requires_grad or not _grad_mode(node)",
            "return not value.requires_grad",
            f"{GRADIENTS} -k transposed",
        ),
        (
            "read symbolic sizes as scales",
            'if known is None and op(value) == "item" and value.args[0].op == "placeholder":',
            "if known is None and isinstance(value, fx.Node):",
            NODES,
        ),
    ),
    *_in(
        "avl_fx/dropped_keys.py",
        ("leave stale keys in the buffer", '            keys.fill_(float("nan"))', "            pass", DROPPED),
        (
            "give the marker the values' shape",
            "nan.expand(*like.shape[:-1], head_dim)",
            "nan.expand(*like.shape)",
            DROPPED,
        ),
        (
            "fill with zeros, which look like keys",
            '            keys.fill_(float("nan"))',
            "            keys.zero_()",
            DROPPED,
        ),
        ("let dense graphs read dropped keys", "    if is_dropped(keys):", "    if False:", DROPPED),
    ),
    *_in(
        "avl_fx/runtime.py",
        ("put the markers at the end", "outputs.insert(position, None)", "outputs.append(None)", DROPPED),
        (
            "mark buffers after the graph has run",
            "                mark_buffer(args[drop.placeholder])",
            "                pass",
            DROPPED,
        ),
    ),
    *_in(
        "kernels/narrow_linear/cpu.py",
        ("leave rows of a piece out", "slice(start, start + step)", "slice(start, start + 1)", NARROW_LINEAR),
    ),
    *_in(
        "kernels/narrow_linear/operator.cpp",
        ("read a strided input as if it were contiguous", " || !input.is_contiguous())", ")", NARROW_LINEAR),
        ("read a bias of another dtype", "bias->scalar_type() != dtype || ", "", NARROW_LINEAR),
    ),
    *_in(
        "kernels/operator.h",
        (
            "lay a result out from behind",
            "d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)",
            "d = 0; d < shape.size(); stride *= std::max<int64_t>(shape[d++], 1)",
            OPERATORS,
        ),
    ),
    *_in(
        "kernels/partitioned_decode/call.h",
        ("store a key where no room is", " || !has_spare_row(key, element)) return", ") return", OPERATORS),
        ("store a value where no room is", " || !has_spare_row(value, element)) return", ") return", OPERATORS),
        ("step through a broadcast mask", "if (size == shape[d]) strides", "strides", OPERATORS),
        ("count a spare row into the strides", "view.size(d) + (d == 2)", "view.size(d)", OPERATORS),
        ("inherit logits of other strides", " ||\n        !logits.is_contiguous())", ")", OPERATORS),
        ("read ranges of other strides", " == 2 && ranges.is_contiguous()", " == 2", OPERATORS),
        ("take keys for missing that are there", "c.left_out = c.keys - rows", "c.left_out = 0", OPERATORS),
        ("clip to more keys than an anchor has", "c.anchor_keys = anchor.size(2)", "c.anchor_keys = seen", OPERATORS),
        ("take keys of more than there will be", " || anchor.size(2) > seen", "", OPERATORS),
    ),
    *_in(
        "kernels/partitioned_decode/operator.cpp",
        (
            "weigh whatever is asked",
            "weigh && *static_cast<const int32_t*>(weigh->data_ptr()) != 0",
            "false",
            OPERATORS,
        ),
        ("hand on what memory held where no key is read", "fill_n(c.kept, c.batch", "fill_n(c.kept, 0", OPERATORS),
        ("inherit logits and keys", "logits.has_value() != anchor_key.has_value() && ", "", OPERATORS),
    ),
    *_in(
        "kernels/numbers.h",
        ("cut bfloat16 off", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16", NARROW_LINEAR),
    ),
    *_in(
        "kernels/attention/cpu.py",
        (
            "align causal attention to the lower right",
            "is_causal=is_causal,",
            "is_causal=is_causal and query.shape[2] == key.shape[2],",
            KERNEL,
        ),
        ("use the default scale", "scale=scale,", "", KERNEL),
    ),
    *_in(
        "kernels/attention/cuda.py",
        (
            "pack heads in the wrong order",
            "packed = query.unflatten(1, (kv_heads, groups)).squeeze(3)",
            "packed = query.unflatten(1, (groups, kv_heads)).squeeze(3).transpose(1, 2)",
            KERNEL,
        ),
        (
            "tile keys instead of repeating them",
            "x[:, :, None].expand(-1, -1, groups, -1, -1)",
            "x[:, None].expand(-1, groups, -1, -1, -1)",
            KERNEL,
        ),
    ),
    *_in(
        "kernels/attention/masks.py",
        ("let the lowest float overflow", ".clamp(min=torch.finfo(query.dtype).min)", "", KERNEL),
    ),
    *_in(
        "kernels/attention/reference.py",
        (
            "hide NaN keys",
            "torch.softmax(logits, dim=-1).masked_fill(hidden, 0.0)",
            "torch.softmax(logits, dim=-1).nan_to_num(0.0)",
            KERNEL,
        ),
        (
            "interleave heads the other way",
            "keys = key.repeat_interleave(groups, dim=1)",
            "keys = key.repeat(1, groups, 1, 1)",
            KERNEL,
        ),
    ),
    *_in(
        "passes/read_ranges.py",
        (
            "decode without the mask",
            "query, *rows, None, None, mask, segments",
            "query, *rows, None, None, None, segments",
            f"{APPEND} -k exact",
        ),
    ),
    *_in(
        "passes/read_ranges.py",
        ("take a flag for nothing", "if is_causal or not isinstance", "if not isinstance", f"{ONCE} -k flag"),
        (
            "take what autograd knows",
            "if any(t is not None and t.requires_grad for",
            "if any(False for",
            f"{ONCE} -k gradients",
        ),
        ("take any strides", "t.stride(3) == 1 for t in", "True for t in", f"{ONCE} -k steps_between"),
        ("take any dtype", "return query.dtype in _DTYPES and", "return", f"{ONCE} -k float64"),
    ),
    *_in(
        "passes/read_once.py",
        (
            "leave latents on a GPU to fused kernels",
            "return decoded_latents(site) is not None",
            "return False",
            f"{ABSORB} -k on_a_gpu",
        ),
        ("take what has no cache", 'return site.cache != "none" or', "return True or", f"{ONCE} -k left_alone"),
        ("take short caches", ">= least * threads", ">= 0", f"{ONCE} -k short"),
        ("take all calls for quick ones", "if is_dispatched() else", "if True else", f"{ONCE} -k sooner"),
        (
            "count threads that have nothing to do",
            "min(torch.get_num_threads(), programs)",
            "torch.get_num_threads()",
            f"{ONCE} -k short",
        ),
        ("forget what a plan refused", "if site.status is Status.FOUND:", "if True:", f"{ONCE} -k refuses"),
    ),
    *_in(
        "kernels/partitioned_decode/walk.h",
        (
            "take rotated keys from elsewhere in a tile",
            "(position + t) * c_.rotated_row",
            "(at_ + t) * c_.rotated_row",
            LATENT_KERNEL,
        ),
        (
            "take a rotated key from elsewhere",
            "= rotated_ + position * c_.rotated_row",
            "= rotated_ + at_ * c_.rotated_row",
            LATENT_KERNEL,
        ),
    ),
    *_in(
        "kernels/partitioned_decode/reading.h",
        (
            "hide from all heads what the first does not see",
            "h < (c.mask_head == 0 ? 1 : c.heads)",
            "h < 1",
            DECODE,
        ),
        (
            "cut off the last key that is seen",
            "range.start + range.length - 1)) --range.length;",
            "range.start + range.length - 2)) --range.length;",
            DECODE,
        ),
        ("cut off eight keys of which some are seen", "if (eight != 0) break;", "if ((eight & 1) != 0) break;", DECODE),
        (
            "ask no mask about a range with holes",
            "return bytes && std::memchr(bytes, 0, range.length) == nullptr;",
            "return bytes != nullptr;",
            DECODE,
        ),
    ),
    *_in(
        "kernels/partitioned_decode/walk.h",
        (
            "look for keys where they would be in a whole cache",
            "(position - range.missing)",
            "position",
            "tests/kernels/test_inherited_decode.py -k native-ragged",
        ),
        (
            "inherit logits of other keys where a tile is whole",
            "taken_ + g * c_.keys + position, TILE",
            "taken_ + g * c_.keys + at_, TILE",
            "tests/kernels/test_inherited_decode.py -k native",
        ),
        (
            "end where a tile shows no key",
            "at_ < now_.end && tile.count == 0",
            "at_ < now_.end && at_ == now_.first",
            DECODE,
        ),
        ("read every row of a batch as the first", "row = now_.batch_row, head", "row = 0, head", DECODE),
        ("ask the mask of another head", "now_.kv_head * group * c_.mask_head", "0 * group * c_.mask_head", DECODE),
    ),
    *_in(
        "kernels/partitioned_decode/native.cpp",
        ("weigh whole vectors alone", "for (; j < range.length; ++j) weight[j]", "for (; false;) weight[j]", DECODE),
        ("turn all heads as the first", "+= more[h * TILE + t];", "+= more[t];", LATENT_KERNEL),
        ("forget the new rotated key", "    if (c.new_rotated)\n", "    if (false)\n", LATENT_KERNEL),
        ("forget what earlier tiles gave", "part.total[g] * factor + sum(total)", "sum(total)", TILES),
        (
            "store a new key where it would be in a whole cache",
            "c.kv_heads, c.keys - c.left_out, c.head_dim",
            "c.kv_heads, c.keys, c.head_dim",
            "tests/kernels/test_inherited_decode.py -k 'native and behind_the_keys'",
        ),
        ("answer the next task with the last one's query", "if (now->task != task) {", "if (task < 0) {", DECODE),
        (
            "leave tasks out between threads",
            "last = count * (thread + 1) / threads",
            "last = count / threads * (thread + 1)",
            "tests/kernels/test_partitioned_decode.py -k 'native and unevenly'",
        ),
    ),
    *_in(
        "kernels/partitioned_decode/tile.h",
        (
            "drop the last keys of a tile",
            "for (; t < count; ++t)\n    for (int h = 0",
            "for (; false;)\n    for (int h = 0",
            TILES,
        ),
        ("weigh all heads as the first", "weights[h * TILE + t]);", "weights[t]);", TILES),
    ),
    *_in(
        "passes/append_in_place.py",
        (
            "read rows where attention reads a cast of them",
            "if fake(node).dtype != fake(root).dtype:",
            "if False:",
            "tests/passes/test_append_in_place.py -k another_dtype",
        ),
        (
            "copy latents on a GPU at each step",
            'site.device == "cpu" or decoded_latents(site) is not None',
            'site.device == "cpu"',
            f"{ABSORB} -k on_a_gpu",
        ),
        (
            "swap keys and values",
            "past_value, new_key, new_value, *rest",
            "past_value, new_value, new_key, *rest",
            APPEND,
        ),
        ("grow what others read", "return readers <= allowed and", "return", APPEND),
        ("grow what autograd knows", "if fake(past).requires_grad or fake(new).requires_grad:", "if False:", APPEND),
        (
            "take any cache for one with room",
            "head_stride >= (keys + 1) * dim)",
            "head_stride >= dim)",
            f"{GROWING} -k of_its_own",
        ),
        ("append two rows as if they were one", "or added[2] != 1:", "or False:", APPEND),
        ("grow a sliding window", 'if site.kind != "full":', "if False:", APPEND),
        ("forget what a plan refused", "if site.status is Status.FOUND:", "if True:", f"{APPEND} -k refuses"),
        (
            "read ranges where nothing is partitioned",
            "if ctx.ranges is not None and site.status is Status.REFUSED:",
            "if False:",
            "tests/e2e/test_position_bias.py -k picks",
        ),
    ),
    *_in(
        "passes/latents.py",
        (
            "take a projection with a bias",
            'or arg(product, 2, "bias") is not None:',
            "or False:",
            f"{ABSORB} -k lookalikes",
        ),
        (
            "take copies that overlap",
            "(found[0][0], found[0][1], found[1][1]) != (0, found[1][0], width)",
            "(found[0][0], found[1][1]) != (0, width)",
            f"{ABSORB} -k lookalikes",
        ),
        (
            "take rotations of each head for shared ones",
            "or old[1] != 1:",
            "or False:",
            f"{ABSORB} -k lookalikes",
        ),
        (
            "forget which rows are taken",
            "return node.args[0], index\n",
            "return node.args[0], None\n",
            ABSORB,
        ),
        (
            "take keys for the first half of heads",
            "return whole, first, first + parts[index]",
            "return whole, 0, parts[index]",
            ABSORB,
        ),
        (
            "count positions from any row",
            "rows[2].start not in (None, 0)",
            "False",
            f"{ABSORB} -k rows_of_their_own",
        ),
    ),
    *_in(
        "passes/absorb_latents.py",
        ("absorb prompts", "if site.queries != 1 and not", "if False and not", f"{ABSORB} -k prompt"),
        (
            "take what was written since",
            "return (keys, values) if unchanged(readings, node) else None",
            "return keys, values",
            ABSORB,
        ),
        ("take what has a gradient", "if fake(node).requires_grad:", "if False:", f"{ABSORB} -k gradient"),
        (
            "rotate the wrong part",
            "part = query[..., rope:] if rotated_first",
            "part = query[..., rope:] if False",
            ABSORB,
        ),
        (
            "expand prompts over rows that are not there",
            'return op(latents) == "append_rows" and',
            'return op(latents) == "nothing" and',
            "tests/e2e/test_latent_attention.py -k second_turn",
        ),
    ),
    *_in(
        "passes/read_ranges.py",
        (
            "tear a lazy block apart",
            "return None if in_block and site.status is not Status.REFUSED else latents_of(site)",
            "return latents_of(site)",
            f"{ABSORB} -k shares_the_logits",
        ),
    ),
    *_in(
        "avl_fx/growing.py",
        ("let every view grow", "if buffer.taken == keys:", "if True:", GROWN),
        ("forget what was taken", "                buffer.taken = keys + 1\n", "", GROWN),
        ("leave no spare row", "return view if keys < claimed", "return view if keys <= claimed", GROWN),
        ("believe a copied attribute", "buffer.address == view.untyped_storage().data_ptr()", "True", GROWN),
        ("copy into a smaller buffer", "view, view.stride(1) // view.stride(2), spare", "view, None, spare", GROWN),
        ("give beams room in vain", "if getattr(args[tensor.before], _RETURNED, False):", "if True:", GROWING),
    ),
    *_in(
        "passes/resolve_rows.py",
        (
            "show rows that are not there",
            'call("masked_fill", old, call(torch.logical_not, there), torch.finfo(dtype).min)',
            "old",
            RESOLVE,
        ),
        ("keep the mask of all tokens", "site.node.update_arg(_MASK, fitted)", "pass", RESOLVE),
        (
            "let anybody read stored rows",
            'return all(user in readers or user.op == "output" for user in node.users)',
            "return True",
            RESOLVE,
        ),
        ("take any mask for one with all columns", "and same_size(sizes[3], keys[2])", "", RESOLVE),
    ),
    *_in(
        "avl_fx/stored_rows.py",
        (
            "give each row of the batch the longest one's columns",
            ".gather(1, source.clamp(min=0)).masked_fill(source < 0, -1)",
            ".gather(1, source.clamp(min=0))",
            STORED,
        ),
        (
            "take rows back and not their tokens",
            "count=self.count - tokens, length=self.length - tokens",
            "count=self.count - tokens",
            STORED,
        ),
    ),
    *_in(
        "avl_fx/region.py",
        (
            "take a wrapper for the model",
            "asked = unwrapped(model)",
            "asked = model",
            f"{WRAPPED} -k one_to_what",
        ),
        (
            "compile the call of what is wrapped",
            "while decoder is not None and decoder is not asked and can_generate(decoder):",
            "while False:",
            f"{REMOTE} -k wrapped",
        ),
        (
            "take the first part that generates",
            "    if len(found) > 1:\n        found = [",
            "    if len(found) > 9:\n        found = [",
            f"{REMOTE} -k no_decoder",
        ),
    ),
    *_in(
        "avl_fx/region_watch.py",
        (
            "compile a vision encoder as a decoder",
            'if self._region.role == "vision" else',
            "if False else",
            f"{CAUSAL} -k 'explain or calibration'",
        ),
        (
            "say nothing of unknown embeddings",
            "            self._notice.positions_are_unknown()",
            "            pass",
            f"{REMOTE} -k nobody_knows",
        ),
    ),
    *_in(
        "avl_fx/regions.py",
        (
            "tell the wrapper alone where images are",
            "for module in generating for handle in ModalityHook",
            "for module in (model,) for handle in ModalityHook",
            f"{WRAPPED} -k whichever",
        ),
        (
            "count the tower's sizes as the decoder's",
            'if region.role != "vision":\n            settings',
            "if True:\n            settings",
            f"{CAUSAL} -k recompile",
        ),
    ),
    *_in(
        "avl_fx/backend.py",
        (
            "trust the cache of a graph whose passes failed",
            "else tuple((i, None) for i in _cached(gm, past))",
            "else ()",
            "tests/e2e/test_failed_pass.py -k missing",
        ),
    ),
    *_in(
        "kernels/inherited_decode/cpu.py",
        (
            "make a buffer of the default dtype",
            "-torch.inf, dtype=torch.float32",
            "-torch.inf",
            "tests/test_tensor_factories.py",
        ),
    ),
    *_in(
        "avl_fx/text_window.py",
        ("forget how much text is gone", "self.gone[row] += count - kept", "pass", STORED),
        ("leave a gap behind a shorter batch row", "if newest > ends[row]:", "if False:", STORED),
        ("take a new token for an old one", "self.newest = position if age is None else age", "pass", STORED),
    ),
    *_in(
        "avl_fx/compact_calls.py",
        ("believe every cache complete", "if rows != length:", "if False:", RESOLVE),
        ("believe every key there", "if rows != count:", "if False:", SPREAD),
        ("let a refused site do without keys", "if site.status is not Status.REFUSED}", "}", SPREAD),
    ),
    *_in(
        "passes/spread_keys.py",
        ("put zeros where the anchor's keys belong", 'theirs if policy.mode == "vla" else None', "None", SECOND),
        ("take text for visual", "missing = torch.lt(rows, 0)", "missing = torch.le(rows, 0)", SPREAD),
        ("leave keys as short as they are", "site.queries == 1 or own is None", "True or own is None", SECOND),
    ),
    *_in(
        "avl_fx/cache.py",
        (
            "let copies count together",
            "twin._sequence = copy.copy(self._sequence)",
            "twin._sequence = self._sequence",
            f"{COMPACT} -k 'batch_rows and text'",
        ),
        (
            "count a forward that has not come yet",
            "return self.tokens if layer <= self.reached else self.start",
            "return self.tokens",
            f"{COMPACT} -k own_length",
        ),
        (
            "let images be cropped",
            '"""Nothing: what is taken back is text."""',
            "super().crop(tokens_to_remove)",
            f"{COMPACT} -k keep_their_images",
        ),
    ),
    *_in(
        "passes/narrow_linears.py",
        ("drop the bias", 'arg(node, 2, "bias"))', "None)", NARROW),
        ("take wide ones too", "math.prod(rows) <= MAX_ROWS", "True", NARROW),
        ("take what autograd knows", "or out.requires_grad:", "or False:", NARROW),
        (
            "take narrow numbers in few rows only",
            "if out.dtype.itemsize < torch.float32.itemsize:",
            "if False:",
            NARROW,
        ),
        ("take what the processor multiplies by itself", "or not pays(out.dtype):", "or False:", NARROW),
        ("take quantised weights", 'hasattr(weight, "__tensor_flatten__")', "False", f"{QUANTISED} -k 'identity'"),
    ),
    *_in(
        "passes/partition_modalities.py",
        (
            "keep scores of each head",
            "if site.latent and (shape(scores)",
            "if False and (shape(scores)",
            "tests/e2e/test_latent_attention.py -k one_ranking",
        ),
        (
            "move rows whose mask is computed from hidden states",
            "if _is_learned(mask):",
            "if False:",
            "tests/e2e/test_position_bias.py -k picks",
        ),
        ("partition latents in a lazy block", "if site.latent and _in_block(site):", "if False:", f"{LATENT} -k lazy"),
        (
            "partition calls that share a layer",
            'if site.kind == "full" and calls[site.layer] > 1:',
            "if False:",
            f"{AVL} -k share_a_layer",
        ),
        (
            "partition sliding windows as well",
            'if site.kind != "full":',
            'if site.kind == "cross":',
            f"{AVL} -k 'oracle and gemma3'",
        ),
        (
            "score by the first query",
            "io.positions, scale, is_causal, window",
            "io.positions, scale, is_causal, 10**6",
            f"{AVL} -k 'oracle and mistral3'",
        ),
        (
            "ask no mask whether visual keys are visible",
            "if first.args[_MASK] is not None:",
            "if False:",
            f"{AVL} -k hides",
        ),
        (
            "ask the masks of prompts only",
            "if first.args[_MASK] is not None:",
            "if not decode and first.args[_MASK] is not None:",
            f"{AVL} -k 'hides and told'",
        ),
    ),
    *_in(
        "avl_fx/zones.py",
        (
            "rank the worst keys first",
            "rank = _ranks(scores, descending=True)",
            "rank = _ranks(scores)",
            STATE,
        ),
        (
            "let what is spread count beside secondary, not in it",
            "chosen = secondary - (secondary.double() * spread).long()",
            "chosen = secondary",
            STATE,
        ),
        (
            "spread from what is not there",
            "order.masked_fill(scores < 0, _MASK + 1)",
            "order",
            STATE,
        ),
        (
            "spread alike in every layer",
            "+ layer * _BY_LAYER",
            "",
            ZONES,
        ),
    ),
    *_in(
        "avl_fx/partition.py",
        (
            "leave out the layers beyond a bound",
            "for first in range(0, len(layers), most)",
            "for first in [0]",
            "tests/avl_fx/test_partition.py -k bound",
        ),
        (
            "number what a compact cache stores by what it stored once",
            "return (present.cumsum(-1) - 1).gather(-1, left).where(there, own)",
            "return left.contiguous()",
            "tests/e2e/test_compact_cache.py -k 'second_turn and spread'",
        ),
        (
            "spread by where rows lie, not by what they are",
            "tokens = [self.tokens[layer].to(like.device) if layer in self.tokens else own for layer in layers]",
            "tokens = [own for layer in layers]",
            f"{AVL} -k 'second_turn and spread'",
        ),
        (
            "forget which token lies where",
            "self.tokens.update(zip(layers, tokens, strict=True))",
            "pass",
            STATE,
        ),
        (
            "leave out as many keys as the batch row with the most has",
            "int((self.slots >= 0).sum(1).min())",
            "int((self.slots >= 0).sum(1).max())",
            SPREAD,
        ),
        (
            "move rows of keys as if none were missing",
            "(rows - before.clamp(max=left_out))",
            "rows",
            SPREAD,
        ),
        (
            "read one visual row too many",
            "holes = _spans(positions[count:])",
            "holes = _spans(positions[count + 1 :])",
            STATE,
        ),
        (
            "take back more than was fed since the prompt",
            "or left < prompt",
            "",
            f"{COMPACT} -k taken_back",
        ),
        (
            "read the gap of a shorter batch row",
            "if stored is not None and stored.ends",
            "if False and stored.ends",
            STORED,
        ),
        (
            "believe a state that is out of date",
            "if found is None or found.generation != found.partition.generation or found.version != _version(tensor):",
            "if found is None:",
            STATE,
        ),
    ),
    *_in(
        "kernels/reselect/reference.py",
        (
            "let equal scores lie as they do",
            "by_token = lying.argsort(-1)",
            "by_token = index.expand_as(lying)",
            RESELECT,
        ),
        ("pair rows that do not move", "inside & ~wanted", "inside", RESELECT),
    ),
    *_in(
        "kernels/partition/native.cpp",
        ("move rows that are not there", "if (!are_within(own, keys)) {", "if (false) {", f"{MOVES} -k not_there"),
        ("let all moves be swaps", "if (are_swaps(own)) {", "if (true) {", f"{MOVES} -k almost_in_twos"),
        ("move all layers as the first", "heads, order = orders[n];", "heads, order = 0;", f"{MOVES} -k several"),
        (
            "pick core by what the first layer read",
            "own = weights[layer] + b",
            "own = weights[0] + b",
            "tests/kernels/test_reselect.py -k cpu_kernel",
        ),
        ("leave the end of a row", "  std::swap_ranges(x + at, x + bytes, y + at);\n", "", f"{MOVES} -k change_places"),
        (
            "take the order of two rows for granted",
            "if (!none && (moves.to(i) != moves.from(i + 1) || moves.to(i + 1) != moves.from(i))) return false;",
            "if (!none && moves.to(i) != moves.from(i + 1)) return false;",
            f"{MOVES} -k almost_in_twos",
        ),
    ),
    *_in(
        "kernels/partition/layers.py",
        (
            "move rows and count no write",
            "torch.autograd.graph.increment_version(",
            "list(",
            ALIKE,
        ),
        ("move layers of other strides together", "cache.shape, cache.stride(),", "cache.shape,", ALIKE),
    ),
    *_in(
        "avl_fx/partition_runtime.py",
        (
            "leave a full buffer out of order",
            "if any(found.length >= buffer.shape[2] for buffer in buffers):",
            "if False:",
            f"{AVL} -k full_static",
        ),
        (
            "leave the values of lazy layers where they were",
            "order = orders.get(layer.scores_from)",
            "order = orders.get(layer.layer)",
            "tests/e2e/test_avl.py -k internvl-torch.compile-static-3-tight-lazy",
        ),
        ("never pick core anew", "if partition.refreshes and", "if False and", f"{AVL} -k 'oracle and mistral3'"),
        (
            "leave the text of keys that lack rows where it was",
            "partition_(key, None, *fewer[order])",
            "pass",
            "tests/e2e/test_lazy_modes.py -k one_choice_of_keys[vla-heavy-compact]",
        ),
        (
            "keep the keys that a later prompt brought back",
            "        self._leave_out_keys(partition, outputs)\n",
            "",
            SECOND,
        ),
        (
            "start a second turn from nothing",
            "        if before is not None:\n",
            "        if False:\n",
            f"{AVL} -k second_turn",
        ),
        (
            "weigh rows for places where they are not",
            "elif moves and weighs_keys(",
            "elif False and weighs_keys(",
            "tests/e2e/test_position_bias.py",
        ),
        ("overwrite rows of other tokens", "if start >= partition.length:", "if True:", REWOUND),
        ("drop tokens of a prompt in pieces", "int(whole and not learns)", "int(not learns)", f"{FILTER} -k pieces"),
        ("drop tokens while learning", "int(whole and not learns)", "int(whole)", f"{FILTER} -k gradients"),
        ("go on from a prompt that was overwritten", "if length > queries else None", "", f"{REWOUND} -k another"),
    ),
    *_in(
        "kernels/survivors/aten.py",
        ("drop the end", "visual & (position < tokens - tail)", "visual", SURVIVORS),
        ("drop the best", "descending=True", "descending=False", SURVIVORS),
        ("drop one fewer", "(rank >= stay)", "(rank > stay)", SURVIVORS),
        ("call fillers valid", "return rows, ~fillers.gather(1, rows)", "return rows, rows >= 0", SURVIVORS),
        ("drop though the mask weighs keys", " and not weighs_keys(last_mask, tokens)", "", SURVIVORS),
        ("drop though nobody may", "int(may_drop) and ", "", SURVIVORS),
    ),
    *_in(
        "passes/fewer_rows.py",
        ("let anything pick positions", "if _tail(node, self.tokens) is None:", "if False:", FEWER),
        (
            "take a constant for the batch",
            "if isinstance(batch, int) and batch != 1:",
            "if False:",
            f"{FEWER} -k constant",
        ),
        (
            "take a mask's rows alone",
            "for dim in dims:\n            if self.alone:",
            "for dim in dims[:1]:\n            if self.alone:",
            FEWER,
        ),
        ("let tokens mix", "if op(node) in _MIXES_POSITIONS or", "if", f"{FEWER} -k 'running or own'"),
        ("let look-ups mix tokens", " or self._relates_along(node)", "", f"{FEWER} -k 'looked or softmax'"),
        ("put by place what differs", "rank <= value.dim() - span", "True", f"{FEWER} -k visual"),
        ("let tokens write elsewhere", "hit != self._has_tokens(named) or", "", f"{FEWER} -k another"),
        ("number pairs as if all were left", "if order > self.cut:", "if False:", f"{EXPERTS} -k left"),
        ("let tokens shift", "size.node.expr.is_Add", "False", f"{FEWER} -k shifted"),
        ("take what is out of date", "if places(source) & self._written:", "if False:", f"{FEWER} -k later"),
        ("leave what was inserted", "            self.roll_back()\n            raise", "            raise", FEWER),
        ("count the end by one", "return -part if isinstance(part, int)", "return 1 if isinstance(part, int)", FEWER),
    ),
    *_in(
        "passes/expert_rows.py",
        ("put rows back anywhere", "if by is _Role.BACK else None", "", EXPERTS),
        ("count in any bins", "const(high) == bins - 1", "True", EXPERTS),
        ("sort experts downwards", 'not arg(node, position, "descending", False) and', "", EXPERTS),
        ("number pairs from anywhere", "const(node.args[0]) == 0", "True", EXPERTS),
        ("look up the token of other pairs", "_expression(sizes[0]) * self.per_token == self.pairs", "True", EXPERTS),
        ("let any operation keep rows", "if op(node) not in _KEEPS_ROWS and", "if False and", EXPERTS),
        ("take pairs as they stood for sorted ones", "not (_constant(value) or is_size)", "False", EXPERTS),
        ("let ids be written through a view", "and self._is_rows_alone(first, mutated_inputs(node)) ", "", EXPERTS),
        ("multiply by any offsets", "if [self._of(n) for n in others] == [_Role.OFFSETS]", "if True", EXPERTS),
        (
            "let rows leave",
            "if role is None:\n                    return False",
            "if role is None:\n                    break",
            EXPERTS,
        ),
    ),
    *_in(
        "passes/add_features.py",
        ("add under another mask", " or _row_mask(rows.args[1]) is not mask", "", ADDS),
        ("add to what was read before", "if any(user < node and", "if False and any(", ADDS),
        ("add to what was written before", " or written_between(hidden, own, node)", "", ADDS),
        ("add features of a later time", " or written_between(features, total, reader)", "", ADDS),
        ("add under a mask of a later time", "written_between(mask, rows, reader) or", "", ADDS),
        ("add whatever is combined", 'if op(total) != "add" or', "if", ADDS),
        ("add though the sum is read", "set(total.users) != {reader} or", "", ADDS),
        ("add where decode steps are", " or ctx.partition.decode", "", ADDS),
    ),
    *_in(
        "passes/partition_modalities.py",
        (
            "score layers of several groups over one of them",
            "if process_group(site) != process_group(first):",
            "if False:",
            SHARDED,
        ),
    ),
    *_in(
        "passes/sharded_heads.py",
        ("take the sum of experts for that of heads", "(projections == 0 and name not in VIEW_OPS)", "False", SHARDED),
        ("look past no projection", "2 if site.latent else 1", "0", SHARDED),
        ("latents are values at once", "2 if site.latent else 1", "1", SHARDED),
        ("see no sum that is still to come", "if placement.is_partial():", "if False:", SHARDED),
    ),
    *_in(
        "avl_fx/scores.py",
        (
            "rank by this process's heads",
            "if self.group is None or not self.own:",
            "if True:",
            "tests/avl_fx/test_scores.py",
        ),
        (
            "take the sum over processes for the mean",
            "(total / processes)",
            "total",
            "tests/avl_fx/test_scores.py",
        ),
        (
            "ask the other processes about each head",
            'return self.shared if kind == "shared" else self.own',
            "return self.shared",
            "tests/avl_fx/test_scores.py",
        ),
    ),
    *_in(
        "avl_fx/observe.py",
        (
            "calibrate by this process's heads",
            "if group is not None:",
            "if False:",
            f"{PARALLEL} -k torch-all",
        ),
    ),
    *_in(
        "passes/filter_prompt.py",
        (
            "drop other tokens in each process",
            "if io.process_group is None else",
            "if True else",
            f"{PARALLEL} -k torch-all",
        ),
        (
            "filter what a stock cache has to keep",
            "if ctx.compact is None:",
            "if False:",
            f"{FILTER} -k stock",
        ),
        (
            "filter a later turn",
            "if any(tensor.before is not None",
            "if any(False",
            f"{FILTER} -k second_turn",
        ),
        (
            "let fillers be seen",
            "if not shortened.alone:\n        _hide",
            "if False:\n        _hide",
            "tests/e2e/test_prefill_filter.py -k whole_model",
        ),
        ("let dropped tokens score", "LEAST = -1.0", "LEAST = 2.0", f"{FILTER} -k many_lengths"),
        ("cut anywhere", "if furthest <= at[node] and", "if", f"{FILTER} -k many_lengths"),
        ("show rows that are not there", 'else float("nan")', "else 0.0", f"{FILTER} -k rows_of_dropped"),
    ),
    *_in(
        "avl_fx/reads.py",
        ("call the first step a refresh", "step % policy.refresh == 0", "step % policy.refresh == 1", READS),
        ("drop the new token as well", "before = row.text + step - 1", "before = row.text + step", READS),
        (
            "forget the minimum",
            "max(round(policy.budget * text), policy.minimum)",
            "round(policy.budget * text)",
            READS,
        ),
        ("leave out text of rows without images", "    if row.visual:\n", "    if True:\n", READS),
    ),
    *_in(
        "passes/observe_attention.py",
        (
            "take every layer's own mask for what counts",
            "shared = (counted.node.args[_MASK], observed.positions)",
            "shared = (mask, observed.positions)",
            f"{OBSERVE} -k 'padding_behind and gemma3'",
        ),
        ("let any two layers share", "if refusal is not None:", "if False:", f"{OBSERVE} -k 'differently'"),
        (
            "count the projection of the values",
            "pending = [query, key, *writes_to(stored)]",
            "pending = [query, key, site.node.args[_VALUE], *writes_to(stored)]",
            f"{OBSERVE} -k 'linear_layers_of'",
        ),
        (
            "observe decode steps",
            "if site.queries != 1] if ctx.observe",
            "] if ctx.observe",
            f"{OBSERVE} -k 'decode_step_is_left'",
        ),
    ),
    *_in(
        "avl_fx/blocks.py",
        (
            "compare with the layer before instead of the anchor",
            "cost += matrix[first][layer]\n",
            "cost += matrix[layer - 1][layer]\n",
            BLOCKS,
        ),
        (
            "join what may not share",
            "< epsilon and math.isfinite(matrix[first][layer]):",
            "< epsilon:",
            f"{BLOCKS} -k walking",
        ),
        (
            "take more layers than asked for",
            "return _traced(table, min(range(least",
            "return _traced(table, max(range(least",
            BLOCKS,
        ),
        (
            "forget what stands before a block",
            "if reached <= most and spent + cost <",
            "if reached <= most and cost <",
            BLOCKS,
        ),
    ),
    *_in(
        "avl_fx/similarity.py",
        (
            "forget half of a divergence",
            "torch.stack([work[o] for o in part]) + row) / 2)",
            "torch.stack([work[o] for o in part]) + row))",
            f"{CALIBRATE} -k by_hand",
        ),
        (
            "let samples without images count",
            "        if seen.any():\n",
            "        if True:\n",
            f"{CALIBRATE} -k concentration",
        ),
    ),
    *_in(
        "passes/library_kernels.py",
        (
            "take the first of more keys than queries for the last",
            "return True if same_size(*lengths) else None",
            "return True",
            f"{LIBRARY} -k it_means",
        ),
        (
            "forget a window",
            'given("window_size_left", -1) != -1 or',
            "False or",
            f"{LIBRARY} -k sliding",
        ),
        (
            "turn back what was not turned",
            "if dims in ({1, 2}, {-3, -2}):",
            "if True:",
            f"{LIBRARY} -k permuted",
        ),
        (
            "drop what else is returned",
            'if any(op(user) != "getitem" or user.args[1] != 0 for user in self.node.users):',
            "if False:",
            f"{LIBRARY} -k log_sum_exp",
        ),
    ),
    *_in(
        "passes/inline_regions.py",
        (
            "keep everything for the gradient",
            "CheckpointPolicy.PREFER_RECOMPUTE,",
            "CheckpointPolicy.MUST_SAVE,",
            f"{CHECKPOINTS} -k kept",
        ),
        ("forget a policy", "_SELECTIVE not in bodies[0].meta", "True", f"{CHECKPOINTS} -k policy"),
        (
            "hand over the first of several results",
            "outputs[place]",
            "outputs[0]",
            f"{CHECKPOINTS} -k more_than_one",
        ),
        (
            "hide what a region writes",
            "if node in inlined)",
            "if not inlined)",
            f"{CHECKPOINTS} -k writes",
        ),
    ),
    *_in(
        "avl_fx/spliced_rows.py",
        ("take zeros for visual", "spliced = ~tokens & (rows != 0)", "spliced = ~tokens", f"{SPLICED} -k padding"),
        (
            "take what is hidden for visual",
            "spliced &= mask[:, -rows.shape[1] :].to(rows.device).bool()",
            "pass",
            f"{SPLICED} -k padding",
        ),
        (
            "take the mask of the past",
            "mask[:, -rows.shape[1] :]",
            "mask[:, : rows.shape[1]]",
            f"{SPLICED} -k padding",
        ),
        ("guess where all are changed", "if not tokens.any():", "if False:", f"{SPLICED} -k not_known"),
        (
            "remember what a graph computes",
            "if torch.compiler.is_compiling() or reads_ids()",
            "if reads_ids()",
            f"{SPLICED} -k inside",
        ),
        ("never forget a prompt", "embedded.taken = True", "pass", f"{SPLICED} -k pieces"),
        (
            "forget a prompt with its first piece",
            "embedded.taken = True",
            "_embedded.set(None)",
            f"{SPLICED} -k pieces",
        ),
        ("leave low bits alone", "mixed ^= mixed >> 32", "pass", f"{SPLICED} -k apart"),
    ),
    *_in(
        "avl_fx/regions.py",
        (
            "let parts that generate compile themselves",
            "dict.fromkeys((*wrapping(model), *filter(can_generate, model.modules())))",
            "dict.fromkeys(wrapping(model))",
            f"{REMOTE} -k compile_past",
        ),
    ),
    *_in(
        "avl_fx/explain.py",
        (
            "watch the model alone",
            "for module in (*wrapping(model), *(() if decoder is None else (decoder.module,))):",
            "for module in wrapping(model):",
            f"{REMOTE} -k explain_runs",
        ),
        (
            "fill the cache of whoever asks",
            "copy.deepcopy(v) if k in _compat.CACHE_NAMES else v",
            "v",
            "tests/avl_fx/test_explain.py -k stays_empty",
        ),
    ),
    *_in(
        "avl_fx/attention_kernels.py",
        (
            "overrule who asked for something else",
            "if _compat.attention_implementation(config) == instead:",
            "if True:",
            f"{OPAQUE} -k comes_back",
        ),
        (
            "say it each time",
            "for name, instead in () if model in _told else",
            "for name, instead in () if False else",
            f"{OPAQUE} -k announced_once",
        ),
    ),
    *_in(
        "avl_fx/regions.py",
        (
            "count the graphs of all plans together",
            "kwargs = {**_compat.isolation(), **kwargs}",
            "pass",
            "tests/e2e/test_recompiles.py -k one_plan",
        ),
        (
            "leave SDPA behind where a model was borrowed",
            "            inside.kernels.give_back()\n",
            "            pass\n",
            f"{OPAQUE} -k borrows",
        ),
    ),
    *_in(
        "avl_fx/_compat.py",
        (
            "give soft-capped logits to SDPA",
            'if getattr(config, "attn_logit_softcapping", None):',
            "if False:",
            f"{OPAQUE} -k soft_capped",
        ),
        (
            "find no model behind a decorator",
            '(self._locals.get("self"), *arguments)',
            '(self._locals.get("self"),)',
            "tests/e2e/test_decorated_forward.py -k gemma3",
        ),
        (
            "find no module behind a decorator",
            "elif isinstance(found, tuple) and part.isdigit() and int(part) < len(found):",
            "elif False:",
            "tests/e2e/test_decorated_forward.py -k gemma3",
        ),
    ),
    *_in(
        "avl_fx/outer_compile.py",
        (
            "let generate compile past what is compiled",
            "vars(model)[_METHOD] = types.MethodType(get_compiled_call, model)",
            "pass",
            f"{DOORS_OPEN} -k past_avl",
        ),
        (
            "answer for another model",
            "types.MethodType(get_compiled_call, model)",
            "lambda _: model.__call__",
            f"{DOORS_OPEN} -k past_avl",
        ),
        (
            "keep answering",
            "vars(self._model).pop(_METHOD, None)",
            "pass",
            f"{DOORS_OPEN} -k past_avl",
        ),
    ),
    *_in(
        "avl_fx/regions.py",
        (
            "let buckets split the decoder",
            '"optimize_ddp": False,',
            "",
            "tests/e2e/test_wrapped_model.py -k buckets",
        ),
    ),
]
