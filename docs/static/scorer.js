// Sphinx's own scores, but solutions come after all other pages: whoever looks for a
// term should not read the answer to an exercise first.
var Scorer = {
  score: ([docname, title, anchor, description, score]) =>
    docname.startsWith("notebooks/solutions/") ? score - 1000 : score,
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
