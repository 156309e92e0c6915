// The browser for rows. Texts of rows are data: they become text nodes, never markup.
(() => {
'use strict';

const CHOICES = {
  split: 'Split',
  recycled: 'Became',
  instruction_status: 'Instruction status',
  instruction_decision: 'Instruction decision',
  response_status: 'Response status',
  response_decision: 'Response decision',
};
const RANGES = {
  ifd_before: 'IFD before',
  ifd_after: 'IFD after',
  gain: 'IFD gain',
  rifd_before: 'r-IFD before',
  rifd_after: 'r-IFD after',
};
const BECAME = { original: 'original', instruction: 'new instruction', response: 'new response', both: 'both new' };
const PARTS = ['instruction', 'input', 'response'];
const PHASES = ['instruction', 'response'];
const PIECES_KEPT = 6;
const MOST_EDITS = 3000;
const DIFF_MS = 1500;
const BREATH_MS = 40; // the longest stretch of searching between two chances for the page to answer a key
const REFILTER_MS = 400;

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat('en');

// ---------------------------------------------------------------- elements

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === false || value === null || value === undefined) continue;
    element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Control characters have no shape of their own; what can't be seen could not be compared.
function visible(text) {
  return text.replace(/[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)/g, (c) =>
    c === '\x7f' ? '\u2421' : String.fromCharCode(0x2400 + c.charCodeAt(0)));
}

const textBlock = (text, name = 'text') => h('div', { class: name, dir: 'auto' }, visible(text ?? ''));

// A score that is infinite comes as text.
const shown = (value, digits = 3) =>
  value === null || value === undefined ? '–' : typeof value === 'number' ? value.toFixed(digits) : String(value);

const signed = (value) => (typeof value === 'number' && value > 0 ? '+' : '') + shown(value).replace('-', '−');

// ---------------------------------------------------------------- data

async function unpackedText(id) {
  const packed = $(id).textContent;
  const bytes = Uint8Array.fromBase64?.(packed) ?? Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
}

const unpacked = async (id) => JSON.parse(await unpackedText(id));

function rowsOf({ columns }) {
  const names = Object.keys(columns);
  return (columns.row ?? []).map((_, i) => {
    const row = { i };
    for (const name of names) row[name] = columns[name][i];
    return row;
  });
}

const pieces = new Map(); // the few that were opened last, oldest first

async function details(i) {
  const n = Math.floor(i / pieceSize);
  const piece = pieces.get(n) ?? unpacked(`piece-${n}`);
  pieces.delete(n);
  pieces.set(n, piece);
  if (pieces.size > PIECES_KEPT) pieces.delete(pieces.keys().next().value);
  return (await piece)[i % pieceSize];
}

let index = []; // what the table shows of each row
let pieceSize = 1;
let table = null;
const places = new Map(); // of each row in the index, by its address

const address = (row) => `#${encodeURIComponent(row.split)}/${row.row}`;

// ---------------------------------------------------------------- table

const plain = (cell) => h('span', { dir: 'auto' }, visible(String(cell.getValue() ?? '–')));
const score = (cell) => document.createTextNode(shown(cell.getValue()));
const became = (name) => (Object.hasOwn(BECAME, name) ? BECAME[name] : visible(String(name ?? '–')));
const badge = (name) => h('span', { class: `badge ${Object.hasOwn(BECAME, name) ? name : ''}` }, became(name));

function gain(cell) {
  const value = cell.getValue();
  return h('span', { class: value > 0 ? 'up' : value < 0 ? 'down' : '' }, signed(value));
}

function start(cell) {
  const text = cell.getValue();
  return text === null ? h('em', { class: 'muted' }, 'unreadable') : h('span', { dir: 'auto' }, visible(text));
}

const link = (cell) =>
  h('a', { href: address(cell.getData()), title: 'Address of this row' }, String(cell.getValue()));

function columns(splits) {
  const sorterParams = { alignEmptyValues: 'bottom' };
  const numeric = { sorter: 'number', sorterParams, hozAlign: 'right', formatter: score };
  const words = { sorter: 'string', sorterParams, formatter: plain };
  const phase = (name) => [
    { ...words, title: 'status', field: `${name}_status`, width: 104 },
    { ...words, title: 'decision', field: `${name}_decision`, width: 128 },
  ];
  return [
    { ...words, title: 'Split', field: 'split', width: 84, visible: splits > 1 },
    { ...numeric, title: 'Row', field: 'row', width: 72, formatter: link },
    { ...words, title: 'Instruction', field: 'start', minWidth: 210, formatter: start },
    { ...words, title: 'Became', field: 'recycled', width: 124, formatter: (cell) => badge(cell.getValue()) },
    { title: 'IFD', columns: [
      { ...numeric, title: 'before', field: 'ifd_before', width: 78 },
      { ...numeric, title: 'after', field: 'ifd_after', width: 68 },
      { ...numeric, title: 'gain', field: 'gain', width: 74, formatter: gain },
    ] },
    { title: 'r-IFD', columns: [
      { ...numeric, title: 'before', field: 'rifd_before', width: 78 },
      { ...numeric, title: 'after', field: 'rifd_after', width: 68 },
    ] },
    { title: 'Instruction reflected', columns: phase('instruction') },
    { title: 'Response reflected', columns: phase('response') },
  ];
}

function buildTable(splits) {
  return new Promise((resolve) => {
    const built = new Tabulator('#rows', {
      data: index,
      index: 'i',
      columns: columns(splits),
      layout: 'fitColumns',
      height: '100%',
      rowHeight: 32,
      placeholder: 'No row is like that',
      columnDefaults: { headerTooltip: false, tooltip: false },
      rowFormatter: mark,
    });
    built.on('rowClick', (event, row) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      choose(row.getData());
    });
    built.on('dataSorted', showOrder);
    built.on('tableBuilt', () => resolve(built));
  });
}

function mark(row) {
  const isChosen = chosen !== null && row.getData().i === chosen.i;
  row.getElement().classList.toggle('chosen', isChosen);
  row.getElement().setAttribute('aria-selected', isChosen);
}

function showOrder(sorters) {
  $('sort').value = sorters[0]?.field ?? '';
  $('order').value = sorters[0]?.dir ?? $('order').value;
}

function fillOrder() {
  const names = { '': 'original order', row: 'Row', start: 'Instruction', ...CHOICES, ...RANGES };
  $('sort').append(...Object.entries(names).map(([field, name]) => h('option', { value: field }, name)));
  const sort = () => ($('sort').value ? table.setSort($('sort').value, $('order').value) : table.clearSort());
  $('sort').addEventListener('change', sort);
  $('order').addEventListener('change', sort);
}

// ---------------------------------------------------------------- filters

let conditions = []; // functions of a row, all of which must hold
let hits = null; // places of the rows that the search has found; null without a search

const passes = (row) => (hits === null || hits.has(row.i)) && conditions.every((holds) => holds(row));
const isStatus = (field) => field.endsWith('_status');
const valuesOf = (row, field) => (isStatus(field) ? row[field].split(', ') : [row[field]]).filter(Boolean);

function choiceField(field, name) {
  const counts = new Map();
  for (const row of index) {
    for (const value of new Set(valuesOf(row, field))) counts.set(value, (counts.get(value) ?? 0) + 1);
  }
  const options = [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) =>
    h('option', { value }, `${field === 'recycled' ? became(value) : value} (${number.format(count)})`));
  return h('label', { hidden: field === 'split' && counts.size < 2 }, name,
    h('select', { name: field }, h('option', { value: '' }, 'any'), ...options));
}

function rangeField(field, name) {
  const bound = (which, word) => h('input', {
    name: `${field}_${which}`, type: 'number', step: 'any', placeholder: which, 'aria-label': `${name}, ${word}`,
  });
  return h('fieldset', {}, h('legend', {}, name), bound('min', 'least'), bound('max', 'most'));
}

function fillFilters() {
  $('fields').prepend(
    ...Object.entries(CHOICES).map(([field, name]) => choiceField(field, name)),
    ...Object.entries(RANGES).map(([field, name]) => rangeField(field, name)));
}

function readConditions() {
  const form = $('controls');
  const value = (name) => form.elements[name].value;
  conditions = [];
  for (const field of Object.keys(CHOICES)) {
    const wanted = value(field);
    if (wanted) conditions.push((row) => valuesOf(row, field).includes(wanted));
  }
  for (const field of Object.keys(RANGES)) {
    const [min, max] = [value(`${field}_min`), value(`${field}_max`)];
    if (min !== '') conditions.push((row) => row[field] !== null && row[field] >= Number(min));
    if (max !== '') conditions.push((row) => row[field] !== null && row[field] <= Number(max));
  }
  $('active').textContent = conditions.length ? `(${conditions.length} on)` : '';
}

function refilter() {
  table.refreshFilter();
  const left = table.getDataCount('active');
  $('count').textContent = `${number.format(left)} of ${number.format(index.length)} rows`;
}

// ---------------------------------------------------------------- search

let searches = 0; // how many were begun; one that is not the last gives up

function textsOf(row) {
  const turns = row.original?.context ?? [];
  const reflections = PHASES.flatMap((phase) => row[`${phase}_reflections`] ?? []);
  return [
    ...PARTS.map((part) => row.original?.[part]),
    ...turns.map((turn) => turn.content),
    ...reflections.flatMap((r) => [r.critique, r.reason, ...PARTS.map((part) => r[part])]),
  ].filter(Boolean);
}

// Places within a piece. Most pieces have no hit, and those need not be parsed.
function hitsIn(text, query) {
  if (!text.toLowerCase().includes(JSON.stringify(query).slice(1, -1))) return [];
  const found = (row) => textsOf(row).some((words) => words.toLowerCase().includes(query));
  return JSON.parse(text).flatMap((row, k) => (found(row) ? [k] : []));
}

async function search() {
  const mine = ++searches;
  const query = $('text').value.trim().toLowerCase();
  $('searching').hidden = !query;
  highlight();
  if (!query) {
    hits = null;
    refilter();
    return;
  }
  hits = new Set();
  showProgress(0);
  refilter();
  let breath = performance.now();
  let shownAt = breath;
  for (let n = 0; n * pieceSize < index.length; n++) {
    const text = await unpackedText(`piece-${n}`);
    if (mine !== searches) return;
    for (const k of hitsIn(text, query)) hits.add(n * pieceSize + k);
    if (performance.now() - breath < BREATH_MS) continue;
    if (performance.now() - shownAt > REFILTER_MS) {
      showProgress(Math.min(index.length, (n + 1) * pieceSize));
      refilter();
      shownAt = performance.now();
    }
    await new Promise((resolve) => { setTimeout(resolve); });
    breath = performance.now();
    if (mine !== searches) return;
  }
  showProgress(index.length);
  refilter();
}

function showProgress(done) {
  $('progress').value = done / index.length;
  $('progress').hidden = done === index.length;
  const all = number.format(index.length);
  const where = done === index.length ? 'all rows searched' : `${number.format(done)} of ${all} searched`;
  $('found').textContent = `${number.format(hits.size)} found, ${where}`;
}

// Marks what was searched for in the texts, where the browser can do so without touching them.
function highlight() {
  if (!CSS.highlights) return;
  CSS.highlights.delete('found');
  const query = $('text').value.trim().toLowerCase();
  if (!query) return;
  const ranges = [];
  const walker = document.createTreeWalker($('detail'), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.toLowerCase();
    if (text.length !== walker.currentNode.data.length) continue; // lower case moved the places
    for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
      const range = new Range();
      range.setStart(walker.currentNode, at);
      range.setEnd(walker.currentNode, at + query.length);
      ranges.push(range);
    }
  }
  if (ranges.length) CSS.highlights.set('found', new Highlight(...ranges));
}

// ---------------------------------------------------------------- differences

const segmenter = Intl.Segmenter ? new Intl.Segmenter(undefined, { granularity: 'word' }) : null;
const NOT_LATIN = /(?!\p{Script=Latin})\p{L}|\p{M}|\p{Extended_Pictographic}/u; // jsdiff knows words in Latin letters

// The changes between two texts as [kind, text] with kind 'same', 'del' or 'ins'; null if they are too many.
function changes(before, after) {
  const options = { maxEditLength: MOST_EDITS, timeout: DIFF_MS };
  let parts;
  if (segmenter && NOT_LATIN.test(before + after)) {
    const words = (text) => Array.from(segmenter.segment(text), (s) => s.segment);
    parts = Diff.diffArrays(words(before), words(after), options);
    parts = parts?.map((part) => ({ ...part, value: part.value.join('') }));
  } else {
    parts = Diff.diffWordsWithSpace(before, after, options);
  }
  return parts ? joined(parts) : null;
}

// A space that two changes have in common separates them for the eye; it goes with them.
function joined(parts) {
  const result = [];
  let removed = '';
  let added = '';
  const flush = () => {
    const end = /[^\S\n]*$/.exec(removed)[0];
    const common = removed && added.endsWith(end) ? end.length : 0;
    result.push(
      ['del', removed.slice(0, removed.length - common)],
      ['ins', added.slice(0, added.length - common)],
      ['same', common ? end : '']);
    removed = added = '';
  };
  parts.forEach((part, k) => {
    if (part.removed) removed += part.value;
    else if (part.added) added += part.value;
    else if (removed && added && k + 1 < parts.length && /^[^\S\n]+$/.test(part.value)) {
      removed += part.value;
      added += part.value;
    } else {
      flush();
      result.push(['same', part.value]);
    }
  });
  flush();
  return result.filter(([, text]) => text);
}

function difference(before, after) {
  if (before === after) return [textBlock(after)];
  if (wholeTexts) return [sideBySide(before, after)];
  const found = changes(before, after);
  if (found === null) {
    const note = 'Too long and too different to mark words: both texts, whole.';
    return [h('p', { class: 'note' }, note), sideBySide(before, after)];
  }
  const tags = { same: 'span', del: 'del', ins: 'ins' };
  const marked = found.map(([kind, text]) => h(tags[kind], {}, visible(text)));
  return [h('div', { class: 'text diff', dir: 'auto' }, ...marked)];
}

function sideBySide(before, after) {
  return h('div', { class: 'sides' },
    h('section', {}, h('h5', {}, 'Before'), textBlock(before)),
    h('section', {}, h('h5', {}, 'After'), textBlock(after)));
}

// ---------------------------------------------------------------- the chosen row

let chosen = null; // its entry of the index
let wholeTexts = false; // shown side by side, without marks

const reflectionsOf = (row) => PHASES.flatMap((phase) =>
  (row[`${phase}_reflections`] ?? []).map((reflection, n) => ({
    phase, n, reflection, id: `${phase}-${n}`, kept: row[`${phase}_decision`]?.candidate === n,
  })));

const capital = (name) => name[0].toUpperCase() + name.slice(1);

const nameOf = ({ phase, n, reflection }) =>
  `${capital(phase)} rewrite ${n + 1}${reflection.oracle ? ` (${reflection.oracle})` : ''}`;

// A rewrite of the response alone was written for the instruction that the row ended with.
function candidatePair(row, id) {
  const found = reflectionsOf(row).find((r) => r.id === id && r.reflection.response !== null);
  if (!found) return row.final;
  const { instruction, input, response } = found.reflection;
  return instruction === null ? { ...row.final, response } : { instruction, input, response };
}

async function choose(entry, { record = true } = {}) {
  const former = chosen;
  chosen = entry;
  if (record) recordAddress(entry);
  for (const { i } of [former, entry].filter(Boolean)) {
    const row = table.getRow(i);
    if (row) mark(row);
  }
  reveal();
  const row = await details(entry.i);
  if (chosen === entry) showDetail(entry, row);
}

function recordAddress(entry) {
  try {
    history.replaceState(null, '', address(entry));
  } catch {
    // Some browsers allow this only so often; the row is shown all the same.
  }
}

// Scrolls the table, not the page, as little as it takes to see the chosen row.
function reveal() {
  if (!passes(chosen)) return;
  const element = table.getRow(chosen.i).getElement();
  const holder = $('rows').querySelector('.tabulator-tableholder');
  if (!element.isConnected) {
    table.scrollToRow(chosen.i, 'center', true);
    return;
  }
  const top = element.getBoundingClientRect().top - holder.getBoundingClientRect().top;
  const below = top + element.offsetHeight - holder.clientHeight;
  if (top < 0) holder.scrollTop += top;
  else if (below > 0) holder.scrollTop += below;
}

function step(by) {
  if (!table.getDataCount('active')) return;
  const current = chosen !== null && passes(chosen) ? table.getRow(chosen.i) : null;
  const row = !current ? table.getRowFromPosition(1) : by > 0 ? current.getNextRow() : current.getPrevRow();
  if (row) choose(row.getData());
}

function showDetail(entry, row) {
  const pane = $('detail');
  pane.replaceChildren(...[
    heading(entry, row),
    ...(row.original === null ? unreadable(row) : comparison(row)),
    ...(row.original?.context?.length ? [earlier(row.original.context)] : []),
    row.original === null ? null : scores(row),
    ...PHASES.map((phase) => phaseSection(row, phase)),
  ].filter(Boolean));
  pane.scrollTop = 0;
  highlight();
}

function heading(entry, row) {
  const go = (name, by, key) => {
    const attributes = { type: 'button', title: `${name} row (${key})`, 'aria-label': `${name} row` };
    const button = h('button', attributes, by > 0 ? '↓' : '↑');
    button.addEventListener('click', () => step(by));
    return button;
  };
  return h('header', { class: 'row-head' },
    h('h3', { dir: 'auto' }, `${entry.split} / ${entry.row}`), badge(row.recycled),
    h('span', { class: 'spacer' }), go('Previous', -1, 'k'), go('Next', 1, 'j'));
}

function unreadable(row) {
  const reason = row.instruction_reflections?.[0]?.reason ?? 'no reason was recorded';
  const note = 'This row of the source could not be read, and stays as it was:';
  return [h('p', { class: 'note' }, note), textBlock(reason)];
}

function comparison(row) {
  const options = reflectionsOf(row).map((found) => h('option',
    { value: found.id, disabled: found.reflection.response === null },
    `${nameOf(found)}: ${found.reflection.status}${found.kept ? ', kept' : ''}`));
  const final = h('option', { value: 'final' }, 'what the row ended with');
  const chooser = h('select', { id: 'candidate' }, final, ...options);
  const whole = h('input', { id: 'whole', type: 'checkbox' });
  const texts = h('div', { id: 'texts' });
  const draw = () => {
    const after = candidatePair(row, chooser.value);
    texts.replaceChildren(...PARTS.flatMap((part) => section(part, row.original[part] ?? '', after[part] ?? '')));
    highlight();
  };
  whole.checked = wholeTexts;
  whole.addEventListener('change', () => { wholeTexts = whole.checked; draw(); });
  chooser.addEventListener('change', draw);
  draw();
  return [
    h('div', { class: 'chooser' }, h('label', {}, 'The original, compared with', chooser),
      h('label', {}, whole, 'side by side')),
    texts,
  ];
}

function section(part, before, after) {
  if (!before && !after) return [];
  const name = before === after ? `${capital(part)}, unchanged` : capital(part);
  return [h('section', { class: 'part', 'data-part': part }, h('h4', {}, name), ...difference(before, after))];
}

function earlier(turns) {
  return h('details', { class: 'earlier' }, h('summary', {}, `Earlier turns (${turns.length})`),
    ...turns.map((turn) => h('section', { class: 'part' }, h('h4', {}, turn.role ?? '–'), textBlock(turn.content))));
}

// ---------------------------------------------------------------- scores and reflections

function scores(row) {
  const cells = (measure, value) => [
    measure, ...[value.value, value.conditioned_loss, value.direct_loss].map((v) => shown(v)),
    `${value.conditioned_tokens ?? '–'} / ${value.direct_tokens ?? '–'}`, value.status ?? '–',
  ].map((text) => h('td', {}, text));
  const both = (name, ifd, rifd) => {
    const known = [['IFD', ifd], ['r-IFD', rifd]].filter(([, value]) => value);
    const head = h('th', { scope: 'rowgroup', rowspan: known.length, dir: 'auto' }, name);
    return known.map(([measure, value], n) => h('tr', {}, n === 0 ? head : null, ...cells(measure, value)));
  };
  const lines = [
    ...both('Original', row.original.ifd, row.original.rifd),
    ...reflectionsOf(row).flatMap((found) => both(nameOf(found), found.reflection.ifd, found.reflection.rifd)),
    ...both('Ended with', row.ifd_score, row.rifd_score),
  ];
  if (!lines.length) return h('section', {}, h('h4', {}, 'Scores'), h('p', { class: 'muted' }, 'Nothing was scored.'));
  const names = ['', 'score', 'value', 'conditioned loss', 'direct loss', 'tokens', 'status'];
  return h('section', {}, h('h4', {}, 'Scores'), h('div', { class: 'wide' }, h('table', { id: 'scores' },
    h('thead', {}, h('tr', {}, ...names.map((name) => h('th', { scope: 'col' }, name)))), h('tbody', {}, ...lines))));
}

function phaseSection(row, phase) {
  const decision = row[`${phase}_decision`];
  const kept = decision?.kept === 'rewrite' ? `rewrite ${decision.candidate + 1} kept` : 'what was there stays';
  return h('section', { class: 'phase', 'data-phase': phase },
    h('h4', {}, `${capital(phase)} reflected`),
    h('p', { class: 'decision' }, 'Decision: ', h('strong', {}, kept), ` (${decision?.reason ?? 'no reason'})`),
    ...reflectionsOf(row).filter((found) => found.phase === phase).map(reflectionCard));
}

function reflectionCard(found) {
  const { reflection, kept } = found;
  const calls = reflection.calls ?? [];
  const tokens = (name) => number.format(calls.reduce((sum, call) => sum + (call[name] ?? 0), 0));
  const ends = calls.map((call) => call.finish_reason ?? '–').join(', ');
  return h('section', { class: `card reflection${kept ? ' kept' : ''}` },
    h('header', {}, h('h5', { dir: 'auto' }, nameOf(found)),
      h('span', { class: 'badge status' }, reflection.status ?? '–'),
      kept ? h('span', { class: 'badge both' }, 'kept') : null),
    reflection.reason ? textBlock(reflection.reason, 'text reason') : null,
    reflection.critique
      ? h('blockquote', {}, textBlock(reflection.critique))
      : h('p', { class: 'muted' }, 'No critique.'),
    calls.length ? h('p', { class: 'muted small' },
      `${calls.length} ${calls.length === 1 ? 'reply' : 'replies'}, ${tokens('prompt_tokens')} tokens read, ` +
      `${tokens('completion_tokens')} written, ended with ${ends}`) : null);
}

// ---------------------------------------------------------------- address and keys

// Returns whether the address names a row.
function follow() {
  const [, split, row] = /^#(.*)\/(-?\d+)$/.exec(location.hash) ?? [];
  if (split === undefined) return false;
  const place = places.get(decodedAddress(split, row));
  if (place !== undefined) {
    choose(index[place], { record: false });
  } else {
    $('detail').replaceChildren(h('p', { class: 'note' }, `There is no row ${row} of that split in this page.`));
  }
  $('browser').scrollIntoView();
  return true;
}

function decodedAddress(split, row) {
  try {
    return address({ split: decodeURIComponent(split), row });
  } catch {
    return ''; // no text was encoded like that
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $('keys').open) return;
  const field = event.target.closest?.('input, select, textarea');
  if (event.key === 'Escape' && field) {
    field.blur();
    return;
  }
  if (field) return;
  const act = {
    j: () => step(1),
    k: () => step(-1),
    '/': () => { $('text').focus(); $('text').select(); },
    '?': () => $('keys').showModal(),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function listen() {
  const form = $('controls');
  let timer = 0;
  const searchSoon = () => { searches++; clearTimeout(timer); timer = setTimeout(search, 200); };
  const filterNow = () => { readConditions(); refilter(); };
  form.addEventListener('submit', (event) => event.preventDefault());
  form.addEventListener('reset', () => setTimeout(() => { table.clearSort(); readConditions(); search(); }));
  $('fields').addEventListener('input', filterNow);
  $('text').addEventListener('input', searchSoon);
  $('keys-button').addEventListener('click', () => $('keys').showModal());
  document.addEventListener('keydown', onKey);
  window.addEventListener('hashchange', follow);
}

// ---------------------------------------------------------------- start

async function open() {
  const packed = await unpacked('index');
  index = rowsOf(packed);
  pieceSize = packed.size;
  index.forEach((row) => places.set(address(row), row.i));
  fillFilters();
  fillOrder();
  $('filters').open = matchMedia('(min-width: 60rem)').matches;
  table = await buildTable(new Set(index.map((row) => row.split)).size);
  table.setFilter(passes);
  refilter();
  listen();
  for (const id of ['text', 'sort', 'order']) $(id).disabled = false;
  if (!follow() && index.length) await choose(index[0], { record: false });
  document.documentElement.dataset.ready = 'yes';
}

open().catch((error) => {
  $('count').textContent = 'The rows can’t be shown.';
  const advice = `This browser could not open the rows: ${error.message}. A newer one may.`;
  $('detail').replaceChildren(h('p', { class: 'note' }, advice));
  throw error;
});
})();
