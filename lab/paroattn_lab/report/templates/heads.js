/* The head browser: cuts the chosen head's tile out of its layer's picture and colours it. */
(() => {
  const source = document.getElementById("head-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const root = document.getElementById("head-browser");
  const inputs = ["layer", "head", "bucket"].map((name) => root.querySelector("[name=" + name + "]"));
  const stops = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
  const skipped = [140, 140, 140], computed = [58, 122, 210];
  const between = (a, b, share) => a.map((value, channel) => value + (b[channel] - value) * share);
  const colours = Array.from({ length: 256 }, (_, level) => {
    const place = (level / 255) * (stops.length - 1), left = Math.min(Math.floor(place), stops.length - 2);
    return between(stops[left], stops[left + 1], place - left);
  });

  const pictures = new Map();
  const picture = (uri) => {
    if (!pictures.has(uri)) {
      const image = new Image();
      image.src = uri;
      pictures.set(uri, image.decode().then(() => image));
    }
    return pictures.get(uri);
  };
  /* Grey levels of one head's tile, or null where the page holds none. */
  const tile = async (sprites, size, layer, head, bucket) => {
    if (!sprites.length) return null;
    const [rows, columns] = size, canvas = new OffscreenCanvas(columns, rows);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(await picture(sprites[layer]), -head * columns, -bucket * rows);
    const pixels = context.getImageData(0, 0, columns, rows).data;
    return { rows, columns, level: (row, column) => pixels[4 * (row * columns + column)] };
  };
  const draw = (name, rows, columns, colour, description) => {
    const canvas = root.querySelector("canvas[name=" + name + "]");
    if (!canvas) return;
    canvas.width = columns;
    canvas.height = rows;
    canvas.ariaLabel = description;
    const image = new ImageData(columns, rows);
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++)
        image.data.set([...colour(row, column), 255], 4 * (row * columns + column));
    canvas.getContext("2d").putImageData(image, 0, 0);
  };
  const facts = (values) => {
    for (const [name, text] of Object.entries(values))
      root.querySelectorAll("[data-fact=" + name + "]").forEach((place) => { place.textContent = text; });
  };
  const percent = (value) => (100 * value).toPrecision(3) + "%";

  let latest = 0;
  const show = async () => {
    const turn = ++latest;
    const [layer, head, bucket] = inputs.map((input) => Number(input.value));
    const texts = [layer, head, data.buckets[bucket]];
    inputs.forEach((input, number) => {
      input.previousElementSibling.textContent = texts[number];
      input.setAttribute("aria-valuetext", texts[number]);
    });
    const order = data.orders[data.order[layer][head]], density = data.densities[bucket][layer][head];
    const error = data.errors ? data.errors[bucket][layer][head] : null;
    const called = !data.maps || data.maps.called[bucket][layer];
    facts({
      order: order.name,
      meaning: order.name + ": " + order.meaning,
      density: percent(density) + " of the blocks computed",
      error: error === null ? (data.errors ? "not called in these steps" : "not measured: needs the model") : percent(error),
      skipped: density === 1 ? "none" : data.compensate[bucket][layer][head] ? "approximated by their means" : "dropped",
      precision: data.precisions[data.precision[layer][head]],
    });
    const place = "layer " + layer + ", head " + head + ", " + data.buckets[bucket];
    const mask = await tile(data.masks.sprites, data.masks.size, layer, head, bucket);
    const maps = data.maps && called
      ? await Promise.all(["original", "chosen"].map((kind) => tile(data.maps[kind], data.maps.size, layer, head, bucket)))
      : [null, null];
    if (turn !== latest) return;  /* another head was chosen while pictures were decoded */
    const heat = (map) => (row, column) => colours[map.level(row, column)];
    const nothing = () => skipped;
    const names = ["original", "chosen"], orders = ["the model's own order", "order " + order.name];
    names.forEach((name, number) => {
      const map = maps[number];
      draw(name, map ? map.rows : 1, map ? map.columns : 1, map ? heat(map) : nothing,
        map ? "Attention map in " + orders[number] + ", " + place : "No attention map, " + place);
    });
    if (mask) {
      const map = maps[1];
      const rows = Math.max(mask.rows, map ? map.rows : 0), columns = Math.max(mask.columns, map ? map.columns : 0);
      const at = (part, row, column) =>
        part.level(Math.floor((row * part.rows) / rows), Math.floor((column * part.columns) / columns));
      draw("mask", rows, columns,
        (row, column) => between(skipped, map ? colours[at(map, row, column)] : computed, at(mask, row, column) / 255),
        "Mask of " + place + ": " + percent(density) + " of the blocks computed");
    }
    root.dataset.shown = [layer, head, bucket].join(" ");
  };
  inputs.forEach((input, number) => {
    input.value = data.start[number];
    input.addEventListener("input", show);
  });
  show();
})();
