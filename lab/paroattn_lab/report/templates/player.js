/* One set of controls for full attention, a method and their difference; the first video leads, the others follow it. */
(() => {
  const source = document.getElementById("clip-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const root = document.getElementById("player");
  const field = (name) => root.querySelector("[name=" + name + "]");
  const panes = [...root.querySelectorAll("video, img")];
  const captions = [...root.querySelectorAll("figcaption")];
  const pairs = field("pair"), variants = field("variant");
  const figures = document.getElementById("clip-figures");
  const option = (text, value) => new Option(text, value);
  data.pairs.forEach((pair, number) => pairs.add(option("“" + pair.prompt + "”, seed " + pair.seed, number)));

  /* Some browsers play no data: URI, all play blobs; each clip is turned into one when it is first shown. */
  const urls = new Map();
  const playable = (uri) => {
    if (!urls.has(uri)) {
      const bytes = Uint8Array.from(atob(uri.slice(uri.indexOf(",") + 1)), (character) => character.charCodeAt(0));
      urls.set(uri, URL.createObjectURL(new Blob([bytes], { type: uri.slice(5, uri.indexOf(";")) })));
    }
    return urls.get(uri);
  };

  const listVariants = () => {
    const before = variants.value;
    const names = data.pairs[pairs.value].variants.map((variant) => variant.name);
    variants.replaceChildren(...names.map((name) => option(name, name)));
    if (names.includes(before)) variants.value = before;
  };
  const show = () => {
    const pair = data.pairs[pairs.value];
    const variant = pair.variants.find((candidate) => candidate.name === variants.value);
    const labels = ["Full attention", variants.value, captions[2].textContent];
    [pair.full, variant.clip, variant.difference].forEach((uri, number) => {
      captions[number].textContent = labels[number];
      panes[number].src = playable(uri);
      panes[number][data.images ? "alt" : "ariaLabel"] = labels[number] + ", “" + pair.prompt + "”";
    });
    figures.textContent = variants.value + " on this pair: " + variant.figures + ".";
  };
  pairs.addEventListener("change", () => { listVariants(); show(); });
  variants.addEventListener("change", show);
  listVariants();
  show();
  if (data.images) return;

  const button = field("play"), position = field("position"), time = field("time"), speed = field("speed");
  const lead = panes[0];
  let playing = false;
  const seek = (seconds) => panes.forEach((video) => { video.currentTime = seconds; });
  const tell = () => {
    const duration = lead.duration || 0;
    position.max = duration;
    position.value = lead.currentTime;
    time.textContent = lead.currentTime.toFixed(1) + " of " + duration.toFixed(1) + " s";
    position.setAttribute("aria-valuetext", time.textContent);
  };
  const start = () => panes.forEach((video) => {
    video.playbackRate = Number(speed.value);
    video.play().catch(() => { /* a new clip came, or the browser wants a click first: the button is there */ });
  });
  const follow = () => {
    if (!playing) return;
    const ready = panes.every((video) => video.readyState > 1 && !video.seeking);
    if (ready && panes.some((video) => video.ended)) {
      seek(0);
      start();
    } else if (ready) {
      for (const video of panes.slice(1)) {
        if (Math.abs(video.currentTime - lead.currentTime) > 0.75 / data.fps) video.currentTime = lead.currentTime;
        if (video.paused) start();
      }
      if (lead.paused) start();
    }
    tell();
    requestAnimationFrame(follow);
  };
  const set = (wanted) => {
    playing = wanted;
    button.textContent = playing ? "Pause" : "Play";
    if (playing) {
      start();
      follow();
    } else {
      panes.forEach((video) => video.pause());
      seek(lead.currentTime);
    }
  };
  lead.addEventListener("loadeddata", tell);
  button.addEventListener("click", () => set(!playing));
  position.addEventListener("input", () => { const wanted = Number(position.value); set(false); seek(wanted); });
  lead.addEventListener("seeked", tell);
  speed.addEventListener("change", () => { if (playing) start(); });
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) set(true);
})();
