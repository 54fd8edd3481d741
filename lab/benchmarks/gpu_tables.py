"""Tables of the GPU kernels: speed, counters, trials, calibration, correctness."""

from __future__ import annotations

import re

from record_tables import surroundings, table


def gpu_attention_table(records: list[dict]) -> list[str]:
    """Milliseconds, prologue, ratios to SDPA and the fastest dense attention, and errors, a table per shape."""
    lines: list[str] = []
    shapes = list(dict.fromkeys((record["batch"], record["heads"], record["tokens"]) for record in records))
    for shape in shapes:
        own = [record for record in records if (record["batch"], record["heads"], record["tokens"]) == shape]
        columns = ["", "blocks", "density", "ms", "prologue", "TFLOP/s", "x sdpa flash", "x sdpa cudnn"]
        others = len(own[0]["times_each"]) > 2  # dense attention that is not SDPA's
        rows = []
        for record in own:
            cells = (
                f"{record['method']} {record['precision']}" + (", compensated" if record["compensate"] else ""),
                "" if record["density"] == 1 else f"{record['block_q']} x {record.get('block_kv', 64)}",
                f"{record['density']:g}",
                f"{record['median_ms']:.2f}",
                f"{record['prologue_ms']:.2f}" if "prologue_ms" in record else "",
                f"{record['tflops']:.0f}",
                *(f"{record['times_each'][f'sdpa {name} bf16']:.2f}" for name in ("flash", "cudnn")),
                *([f"{record['times_sdpa']:.2f}"] if others else []),
                "" if record["error"] is None else f"{record['error']:.1e}",
                *(f"{record[f'{bound}_roofline_ms']:.2f}" for bound in ("matrix", "exp2")),
            )
            rows.append(cells)
        title = f"Batch {shape[0]}, {shape[1]} heads, {shape[2]:,} tokens, head_dim {own[0]['head_dim']}:"
        heads = columns + ["x fastest dense"] * others + ["error", "matrix roofline", "exp2 roofline"]
        lines += [title, "", *table(heads, rows), ""]
    first = records[0]
    return [
        *lines,
        f"Median of {first['rounds']} interleaved rounds in bfloat16, everything included; ratios are medians of the "
        "rounds' ratios; the prologue is the GPU time of its kernels; errors are relative to float64, in L2. "
        f"{surroundings(first)}.",
    ]


def sampling_table(records: list[dict]) -> list[str]:
    """PSNR and seconds of plans made in several ways by model and density, with the paired loss."""
    rows = []
    for record in records:
        way = record["way"]
        loss = "" if way == "thorough" else f"{record['gain']:+.2f} ± {record['standard_error']:.2f}"
        cells = (f"{record['psnr']:.2f}", loss, f"{record['seconds']:.1f}")
        rows.append((record["model"], way, f"{record['density']:g}", *cells))
    first = records[0]
    heads = ("model", "calibration", "density", "PSNR (dB)", "to the thorough one", "seconds")
    return [
        *table(heads, rows),
        "",
        f"Mean over {first['pairs']} prompt/seed pairs; difference with the standard error of the paired differences. "
        f"Beside requests, seconds are those that the last one took longer than a dense one. {surroundings(first)}.",
    ]


def model_calibration_table(records: list[dict]) -> list[str]:
    """Seconds of a whole calibration by model, part by part, beside those of a generation."""
    names = {"orders": "orders", "costs": "costs and choice of blocks", "effects": "effects", "calibration": "whole"}
    rows = [
        (
            record["preset"],
            str(record["layers"]),
            str(record["steps"]),
            *(f"{record['seconds'][name]:.0f}" for name in names),
            f"{record['seconds']['generation']:.1f}",
            _compiled(record),
            f"{record['peak_gib']:.0f}",
            f"{record['host_gb']:.1f}" if "host_gb" in record else "",
            _observed(record),
        )
        for record in records
    ]
    heads = ("model", "layers", "steps", *names.values(), "one generation", "50 steps, compiled")
    heads += ("peak GiB on the GPU", "GB on the host", "a dense request, one that is observed, the next, later ones")
    return [
        *table(heads, rows),
        "",
        "Seconds, kernels compiled first included; one prompt with guidance, random weights, models not compiled where "
        "it does not say so; one generation has as many steps. "
        f"{surroundings(records[0])}.",
    ]


def _compiled(record: dict) -> str:
    """Seconds of a generation of 50 steps with the model's own attention, compiled."""
    seconds = record["seconds"].get("compiled generation")
    return "" if seconds is None else f"{seconds / record['steps'] * 50:.0f}"


def _observed(record: dict) -> str:
    """Seconds of a dense request, of those beside which a plan is made, and of one that runs with it."""
    if not record.get("observed_steps"):
        return ""
    seconds = record["seconds"]
    names = ("dense request", "observed request", "observed planned request", "planned request")
    found = ", ".join(f"{seconds[name]:.0f}" for name in names if name in seconds)
    return f"{found} ({record['observed_steps']} steps)"


def calibration_table(records: list[dict]) -> list[str]:
    """Milliseconds per head by call and shape, and how many dense attentions of a head that is."""
    shapes = list(dict.fromkeys((record["tokens"], record["head_dim"]) for record in records))
    cells: dict[str, dict] = {}
    for record in records:
        cell = f"{record['median_ms']:.2f} ms ({record['over_dense']:.1f})"
        cells.setdefault(record["call"], {})[record["tokens"], record["head_dim"]] = cell
    lines = table(
        ("", *(f"{tokens:,} x {head_dim}" for tokens, head_dim in shapes)),
        ((call, *(own.get(shape, "") for shape in shapes)) for call, own in cells.items()),
    )
    first = records[0]
    return [
        *lines,
        "",
        "Per head, tokens x head_dim, medians; in brackets as a multiple of a head's dense attention (SDPA, flash). "
        f"{surroundings(first)}.",
    ]


def counters_table(records: list[dict]) -> list[str]:
    """Nsight Compute's counters of the forward, a column per kernel."""
    names = {
        "duration_ms": "time (ms)",
        "registers": "registers per thread",
        "active_warps_per_scheduler": "warps per scheduler",
        "l2_busy": "L2 cache busy (%)",
        "issue_slots_busy": "issue slots busy (%)",
        "no_eligible_warp": "cycles without an eligible warp (%)",
        "xu_busy": "exponentials and conversions busy (%)",
        "alu_busy": "ALU busy (%)",
        "fma_busy": "FMA busy (%)",
    }
    kernels = {"attention_forward": "Triton", "hopper_forward.cu": "CUDA"}
    heads = [f"{kernels[item['kernel']]}, {item['precision']}, D {item['head_dim']}" for item in records]
    lines = table(
        ("", *heads),
        ((shown, *(f"{item[name]:.4g}" if name in item else "" for item in records)) for name, shown in names.items()),
    )
    shapes = "; ".join(f"{item['heads']} heads of {item['tokens']:,} tokens" for item in records)
    return [*lines, "", f"Density {records[0]['density']}; {shapes}. {surroundings(*records)}."]


def trials_table(records: list[dict]) -> list[str]:
    """Milliseconds of the forward for the fastest of each kind of kernel at two densities."""
    rows: dict[tuple, dict[str, list[float]]] = {}
    for record in records:
        work = f"{record['precision']}, {record['heads']} heads, {record['tokens']:,} x {record['head_dim']}"
        row = rows.setdefault((work, _kind_of(record["kernel"])), {})
        for density, milliseconds in record["forward_ms"].items():
            row.setdefault(density, []).append(milliseconds)
    works = list(dict.fromkeys(work for work, _ in rows))
    shown = []
    for work, kind in sorted(rows, key=lambda row: works.index(row[0])):
        cells = rows[work, kind]
        best = (f"{min(cells[density]):.2f}" if density in cells else "" for density in ("0.3", "1"))
        shown.append((work, kind, *best))
    lines = table(("", "kernel", "density 0.3 (ms)", "dense (ms)"), shown)
    return [*lines, "", f"The fastest setting of each, by density. {surroundings(*records)}."]


def _kind_of(kernel: str) -> str:
    if kernel.startswith("CUDA"):
        return kernel
    if kernel.startswith("gluon"):
        return "Gluon"
    if kernel == "triton sums":
        return "Triton, row sums by dp4a"
    if "at most" in kernel and kernel.startswith("triton width"):
        return "Triton, registers limited"
    return "Triton" + re.sub(r",? width.*| \(table\)", "", kernel.removeprefix("triton"))


def correctness_table(records: list[dict]) -> list[str]:
    """How many checks were made and passed, and the largest share of its limit that a check used."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(_subject(record["variant"]), []).append(record)
    rows = []
    for name, own in groups.items():
        worst = max(own, key=lambda record: record["error"])
        share = max(
            record["error"] / record["limit"] if record["limit"] else float(record["error"] > 0) for record in own
        )
        passed = sum(record["passed"] for record in own)
        rows.append((name, f"{len(own)}", f"{passed}", f"{worst['error']:.1e}", f"{share:.2f}"))
    first = records[0]
    lines = table(("", "checks", "passed", "largest error", "share of the limit"), rows)
    return [*lines, "", f"Errors are relative, in L2. {surroundings(first)}."]


def _subject(variant: str) -> str:
    """What a check is about: formats and head_dim of a forward, or the name of another call."""
    match = re.match(r"(\S+) +D +(\d+)", variant)
    if match is None:
        return re.sub(r",.*| (interleaved|halves)$", "", variant)
    tokens = int(re.search(r" N +([\d,]+)", variant)[1].replace(",", ""))
    kernel = ", Triton's" if variant.endswith("triton") else ""
    return f"forward, {match[1]}{kernel}, {'lengths of models' if tokens > 10_000 else 'short'}"


def host_table(records: list[dict]) -> list[str]:
    """Microseconds of the CPU per planned call, and milliseconds of calls in a row, by whether launches are kept."""
    rows = []
    for record in records:
        precision = record["precision"] + (", compensated" if record["compensate"] else "")
        work = f"{record['heads']} x {record['tokens']:,} x {record['head_dim']}"
        times = (f"{record['host_us']:.0f}", *(f"{record[name]:.3f}" for name in ("ms", "graph_ms", "sdpa_ms")))
        rows.append((work, precision, record["way"], *times))
    heads = (
        "heads, tokens, head_dim",
        "precision",
        "launches",
        "CPU (us)",
        "in a row (ms)",
        "CUDA graph (ms)",
        "SDPA (ms)",
    )
    return [*table(heads, rows), "", f"Density {records[0]['density']}. {surroundings(records[0])}."]


def linear_steps_table(records: list[dict]) -> list[str]:
    """Compiled steps with a plan, linear layers in FP8, and both, over the model's own."""
    densities = sorted({round(record["density"], 3) for record in records} - {1.0}, reverse=True)
    kinds = [("own attention + float8", 1.0)]
    kinds += [(method, density) for density in densities for method in ("paroattn", "paroattn + float8")]
    found = {(record["model"], record["method"], round(record["density"], 3)): record for record in records}
    rows = []
    for model in dict.fromkeys(record["model"] for record in records):
        own = found[model, "own attention", 1.0]
        times = [found.get((model, *kind)) for kind in kinds]
        rows.append(
            (
                f"{model} ({own['layers']} of {own['model_layers']} layers)",
                f"{own['median_ms']:.1f} ms",
                *("" if item is None else f"{item['times_own']:.2f}x" for item in times),
            )
        )
    names = ["FP8 alone", *(f"{name} {density}" for density in densities for name in ("plan", "plan + FP8"))]
    return [
        *table(("model", "own attention", *names), rows),
        "",
        "One step, blocks compiled, random weights and masks, INT8/FP8 attention; times over the model's own attention "
        f"(cuDNN) in 16 bits, medians of {records[0]['rounds']} interleaved rounds. {surroundings(records[0])}.",
    ]


def balance_table(records: list[dict]) -> list[str]:
    """The slowest rank over the mean, heads in order and balanced."""
    rows = [
        (
            f"{record['density']}",
            str(record["ranks"]),
            record["method"],
            f"{record['layer_ms']:.1f} ms",
            f"{record['slowest']:.3f}",
            f"{record['estimated']:.3f}",
            f"{record['pack_ms']:.2f} + {record['unpack_ms']:.2f} ms",
        )
        for record in records
        if record["ranks"] > 1
    ]
    first = records[0]
    head = ("density", "GPUs", "heads", "a layer's slowest rank", "over the mean", "estimated", "packing")
    return [
        *table(head, rows),
        "",
        f"{first['model']}: {first['heads']} heads of {first['tokens']:,} x 128, random masks, densities of heads from "
        f"0.05 to 0.6, {first['precision']}; the heads of each rank in turn on one GPU, mean of 4 layers. "
        f"{surroundings(first)}.",
    ]
