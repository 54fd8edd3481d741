"""Tables of evaluations, ablations, whole models, and the operator on CPUs."""

from __future__ import annotations

from collections.abc import Iterable


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    heads = list(heads)
    return [_row(heads), "|" + "---|" * len(heads), *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def evaluation_table(records: list[dict]) -> list[str]:
    rows = []
    for record in records:
        psnr = f"{record['psnr']:.2f} ± {record['psnr_spread']:.2f}"
        ssim = f"{record['ssim']:.4f} ± {record['ssim_spread']:.4f}"
        cosine = f"{record['cosine']:.4f} ± {record['cosine_spread']:.4f}"
        speed = f"{record['speed_up']:.2f}x"
        rows.append((record["variant"], f"{record['density']:.3f}", psnr, ssim, cosine, speed))
    first = records[0]
    steps = first["settings"]["num_inference_steps"]
    return [
        *table(("variant", "density", "PSNR (dB)", "SSIM", "cosine similarity", "transformer"), rows),
        "",
        f"Mean ± standard deviation over {len(first['pairs'])} prompt/seed pairs; last column: median of the paired "
        f"ratios of time in the transformer to full attention; {first['grid']}, {steps} steps; {surroundings(first)}.",
    ]


def attention_table(records: list[dict]) -> list[str]:
    """Times SDPA by contender and shape, and SDPA's own milliseconds; equal densities and prologue included only."""
    shown = [record for record in records if record["prologue"] is not False and not record["unequal"]]
    shapes = list(dict.fromkeys((record["tokens"], record["heads"], record["head_dim"]) for record in shown))
    names = {"paroattn": "paroattn {precision}", "flex": "FlexAttention {precision}", "sdpa": "SDPA {precision}"}
    rows: dict[tuple[str, float], dict] = {}
    for record in shown:
        name = names[record["method"]].format(**record)
        cell = f"{record['times_sdpa']:.2f}x"
        if record["method"] == "sdpa":
            cell = f"{record['median_ms']:.0f} ms"
        key = (name, record["density"])
        rows.setdefault(key, {})[record["tokens"], record["heads"], record["head_dim"]] = cell
    lines = table(
        ("", "density", *(f"{tokens:,} x {dim}" for tokens, _, dim in shapes)),
        (
            (name, f"{density:g}", *(cells.get(shape, "") for shape in shapes))
            for (name, density), cells in rows.items()
        ),
    )
    first = shown[0]
    backend = next(record["backend"] for record in shown if record["backend"])
    heads = ", ".join(f"{tokens:,} tokens: {heads} heads" for tokens, heads in dict(s[:2] for s in shapes).items())
    return [
        *lines,
        "",
        "Tokens x head_dim. Speed is against the faster of SDPA in fp32 and bf16, as the median of the ratios of "
        f"interleaved rounds; quantising and reordering are included. {heads}. {surroundings(first)} ({backend}).",
    ]


def compensation_table(records: list[dict]) -> list[str]:
    """Time with compensation over time without, by instructions and shape; a column per density and precision."""
    times: dict[tuple, dict] = {}
    for record in records:
        if record["method"] == "paroattn" and record["prologue"]:
            row = (record["backend"].partition(",")[0], record["tokens"], record["head_dim"])
            place = (record["density"], record["precision"], record["compensate"])
            times.setdefault(row, {})[place] = record["median_ms"]
    columns = list(dict.fromkeys(place[:2] for cells in times.values() for place in cells))
    heads = (
        f"{density:g}, {precision.upper() if precision == 'int8' else precision}" for density, precision in columns
    )
    rows = []
    for (backend, tokens, head_dim), cells in sorted(times.items()):
        ratios = (f"{cells[(*column, True)] / cells[(*column, False)]:.2f}" for column in columns)
        rows.append((f"`{backend}`, {tokens:,} x {head_dim}", *ratios))
    rounds = sorted({record["rounds"] for record in records})
    return [*table(("", *heads), rows), "", f"Ratios of medians of {rounds[0]} to {rounds[-1]} interleaved rounds."]


def model_table(records: list[dict]) -> list[str]:
    """A row per contender of each model."""
    heads = ("model", "tokens", "layers", "attention", "density", "step", "x own", "x fastest dense")
    rows = []
    for record in records:
        name = record["method"] + ("" if record["plan"] is None else f" {record['precision']}")
        by_the_model = record["plan"] is not None and not record["compiled"] and record.get("rotary") == "the model's"
        cells = (
            record["model"] + (", compiled" if record["compiled"] else ", eager") + ", its own RoPE" * by_the_model,
            f"{record['tokens']:,}",
            f"{record['layers']} of {record['model_layers']}",
            name,
            f"{record['density']:.3g}",
            f"{record['median_ms']:.{0 if record['median_ms'] > 100 else 1}f} ms",
            f"{record['times_own']:.2f}x",
            f"{record['times_dense']:.2f}x",
            f"{record['attention_share']:.0%}",
        )
        rows.append(cells)
    first = records[0]

    def every(name: str) -> str:
        return " or ".join(dict.fromkeys(str(record[name]) for record in records))

    return [
        *table((*heads, "share of attention"), rows),
        "",
        f"One step of the transformer in {first['dtype']}, weights: {every('weights')}. Median of {every('rounds')} "
        "interleaved rounds; speed is the median of the rounds' ratios. The share is that of the kernels of "
        f"self-attention, without compiling. {surroundings(first)}.",
    ]


def ablation_table(records: list[dict]) -> list[str]:
    """PSNR of each method, a column per density (and precision), and paired differences to the paper's method."""
    places = list(dict.fromkeys((record["asked_density"], record["precision"]) for record in records))
    rows: dict[str, dict] = {}
    for record in records:
        rows.setdefault(record["method"], {})[record["asked_density"], record["precision"]] = record
    heads = [f"{density:g}" + ("" if precision == "exact" else f" + {precision}") for density, precision in places]
    lines = table(
        ("PSNR (dB)", *heads),
        (
            (method, *(_with_gain(cells[place], method) if place in cells else "" for place in places))
            for method, cells in rows.items()
        ),
    )
    first = records[0]
    return [
        *lines,
        "",
        f"Mean over {len(first['pairs'])} prompt/seed pairs; in brackets the mean paired difference to the paper's "
        "method at the same density and precision and its standard error. "
        f"{first['settings']['num_inference_steps']} steps; {surroundings(first)}.",
    ]


def _with_gain(record: dict, method: str) -> str:
    if record["psnr"] is None:
        return "∞"
    shown = f"{record['psnr']:.2f}"
    if method == "paper" or record["over_paper"] is None:
        return shown
    return f"{shown} ({record['over_paper']:+.2f} ± {record['over_paper_error']:.2f})"


def closeness_table(records: list[dict]) -> list[str]:
    """The columns of the paper's table 1 that compare with full attention."""
    digits = {"psnr": 2, "ssim": 4, "cosine": 4}
    return table(
        ("method", "density", "precision", "PSNR (dB)", "SSIM", "CosSim"),
        (
            (
                record["method"],
                f"{record['density']:.3f}",
                record["precision"],
                *(f"{record[name]:.{count}f}" for name, count in digits.items()),
            )
            for record in records
        ),
    )


def plan_size_table(records: list[dict]) -> list[str]:
    """Megabytes of masks and files, and seconds to load them."""
    rows = []
    for record in records:
        sizes = (record[name] / 1e6 for name in ("bits", "single masks", "differences of buckets", "palette"))
        load = ""
        if "load_seconds" in record:
            processors = record["load_user_seconds"] + record["load_system_seconds"]
            load = f"{record['load_seconds']:.1f} ({processors:.1f})"
        megabytes = (f"{size:,.1f}" if size < 10 else f"{size:,.0f}" for size in sizes)
        rows.append((record["workload"], record["noise"], *megabytes, load))
    heads = ("plan", "noise", "bits (MB)", "zstandard 9", "of differences", "file (MB)", "load (s)")
    return [*table(heads, rows), "", f"{surroundings(*records)}."]


def transfer_table(records: list[dict]) -> list[str]:
    """PSNR of plans that were made without calibrating at the target size, and how much of the gap they close."""
    rows = [
        (
            record["model"],
            record["way"],
            f"{record['psnr']:.2f}",
            "" if record.get("gain") is None else f"{record['gain']:+.2f} ± {record['standard_error']:.2f}",
            f"{record['gap_closed']:.0%}" if "from " in record["way"] else "",
            "" if record.get("seconds") is None else f"{record['seconds']:.0f}",
        )
        for record in records
    ]
    first = records[0]
    return [
        *table(("model", "plan", "PSNR (dB)", "to the calibrated one", "of the gap", "calibrating (s)"), rows),
        "",
        f"Density {first['density']:.1f}, exact; mean over {first['pairs']} prompt/seed pairs; difference with the "
        "standard error of the paired differences; the gap is that between positions alone and a calibration. "
        f"{surroundings(first)}.",
    ]


def repair_table(records: list[dict]) -> list[str]:
    """PSNR with and without repair by probes, and the operator's time with and without."""
    rows = [
        (
            record["model"],
            f"{record['density']:.3g}",
            f"{record['psnr']:.2f}",
            f"{record['repaired_psnr']:.2f}",
            f"{record['gain']:+.2f} ± {record['standard_error']:.2f}",
        )
        for record in records
        if record["kind"] == "repair"
    ]
    times = [
        f"{record['heads']} heads of {record['tokens']:,} x {record['head_dim']} take {record['ms']:.1f} ms, with "
        f"repair {record['repaired_ms']:.1f} ({record['times']:.2f} times as long)"
        for record in records
        if record["kind"] == "repair speed"
    ]
    first = next(record for record in records if record["kind"] == "repair")
    timed = next(record for record in records if record["kind"] == "repair speed")
    precision = timed.get("precision", "int8").upper()
    return [
        *table(("model", "density", "PSNR (dB)", "with repair", "difference"), rows),
        "",
        f"Exact; mean over {first['pairs']} prompt/seed pairs, difference with the standard error of the paired "
        f"differences. Time of the operator in {precision} at density 0.3: {'; '.join(times)}. {surroundings(first)}.",
    ]


def busy_table(records: list[dict]) -> list[str]:
    """All threads beside one, where other processes take the CPU."""
    rows = [
        (
            f"{record['precision']}, density {record['density']:g}",
            str(record["busy_processes"]),
            f"{record['one_thread_ms']:.0f} ms",
            f"{record['all_threads_ms']:.0f} ms",
            f"{record['ninth_decile_ms']:.0f} ms",
            f"{record['times_one']:.2f}",
        )
        for record in records
    ]
    first = records[0]
    heads = ("", "busy processes", "one thread", "all threads", "of ten calls the second slowest", "all / one")
    return [
        *table(heads, rows),
        "",
        f"{first['heads']} heads of {first['tokens']:,} x {first['head_dim']}, medians; last column: median of the "
        f"rounds' ratios. {surroundings(first)}.",
    ]


def linears_table(records: list[dict]) -> list[str]:
    """PSNR with linear layers in 8 bits, alone and beside a plan."""
    found = {(record["model"], record["what"]): record for record in records}
    rows = []
    for model in dict.fromkeys(record["model"] for record in records):
        plan, linears, both = (found[model, what] for what in ("plan", "linears", "both"))
        difference = f"{both['gain']:+.2f} ± {both['standard_error']:.2f}"
        rows.append((model, *(f"{item['psnr']:.2f}" for item in (linears, plan, both)), difference))
    first = records[0]
    return [
        *table(("model", f"linear layers in {first['format']}", "plan", "both", "both over the plan"), rows),
        "",
        f"PSNR in dB over {first['pairs']} prompt/seed pairs against the model as it is; plans of density 0.3, exact; "
        f"difference with the standard error of the paired differences. {surroundings(first)}.",
    ]


def known_models_table(records: list[dict]) -> list[str]:
    """The transformer classes, what they are called by, and how much of their work attention is."""
    rows = []
    for record in records:
        others = {"prefix": "before", "suffix": "after", None: "none"}[record["others"]]
        size, tokens, share = record["usual"], record["tokens"], record["attention_share"]
        rows.append(
            (
                f"`{record['class']}`",
                ", ".join(f"`{name}`" for name in record["pipelines"]),
                f"`{record['example']}`" if record["example"] else "",
                f"{record['layers']} x {record['heads']} x {record['head_dim']}" if "layers" in record else "",
                others if record["others_ask"] else f"{others}, as keys only",
                f"{size}: {tokens:,}" if size else "",
                "" if share is None else f"{share:.0%}",
            )
        )
    heads = ("transformer class", "tested with", "such as", "layers x heads x head_dim", "other tokens")
    return [*table((*heads, "visual tokens of a usual size", "attention's share"), rows)]


def few_steps_table(records: list[dict]) -> list[str]:
    """PSNR by number of steps and shift, and the difference to a plan that was calibrated on 20 steps, if measured."""
    compared = any(record.get("gain") for record in records)
    rows: dict[tuple, list[str]] = {}
    for record in records:
        cells = rows.setdefault((record["model"], record["steps"], record["shift"]), [])
        gain = "" if not record.get("gain") else f"{record['gain']:+.2f} ± {record['standard_error']:.2f}"
        cells += [f"{record['psnr']:.2f}", gain][: 1 + compared]
    heads = ["model", "steps", "shift"]
    for density in dict.fromkeys(record["density"] for record in records):
        heads += [f"PSNR at {density:g} (dB)", "to 20 steps"][: 1 + compared]
    first = records[0]
    difference = (
        "Difference to a plan that was calibrated on 20 steps and spends as many blocks on these, with the standard "
        "error of the paired differences. "
    )
    return [
        *table(heads, ((model, str(steps), f"{shift:g}", *cells) for (model, steps, shift), cells in rows.items())),
        "",
        f"Without guidance, exact; mean over {first['pairs']} prompt/seed pairs against full attention with as many "
        f"steps. {difference if compared else ''}{surroundings(first)}.",
    ]


def surroundings(record: dict, *others: dict) -> str:
    """Machine and versions of a record, and how many threads there were for it and the others."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    counts = list(dict.fromkeys(item["threads"] for item in (record, *others)))
    threads = f"{' or '.join(map(str, counts))} thread{'s' if max(counts) > 1 else ''}"
    gpu = f"{record['gpu']}; " if "gpu" in record else ""
    return f"{gpu}{record['machine']}, {threads}; {versions}"
