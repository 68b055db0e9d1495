/* What a Shortcut takes for granted, and how it answers then. */

#include "hot.h"

static int
memory_of(PyObject *pairs, Memory **memory, Py_ssize_t *many)
{
    *many = PyTuple_Size(pairs);
    if (*many < 0) {
        return -1;
    }
    *memory = PyMem_Calloc((size_t)*many + 1, sizeof(Memory));
    if (*memory == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < *many; i++) {
        unsigned long long start;
        PyObject *pair = PyTuple_GET_ITEM(pairs, i);
        if (!PyTuple_Check(pair)) {
            PyErr_SetString(PyExc_TypeError, "Memory is told by address and length.");
            return -1;
        }
        if (!PyArg_ParseTuple(pair, "Kn", &start, &(*memory)[i].length)) {
            return -1;
        }
        (*memory)[i].start = (char *)(uintptr_t)start;
    }
    return 0;
}

int
are_tuples_of(PyObject *items, Py_ssize_t many)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); i++) {
        PyObject *item = PyTuple_GET_ITEM(items, i);
        int fits = PyTuple_Check(item) && PyTuple_GET_SIZE(item) == many;
        if (!fits || (many == 3 && !PyUnicode_Check(PyTuple_GET_ITEM(item, 1)))) {
            PyErr_Format(PyExc_TypeError, "%R is no tuple of %zd as it has to be.", item, many);
            return 0;
        }
    }
    return 1;
}

/* Its references, each told once. */
#define REFERENCES(EACH)                                                                         \
    EACH(facts) EACH(questions) EACH(match) EACH(holds) EACH(sizes) EACH(fits) EACH(engine)      \
    EACH(pool) EACH(waiting) EACH(slot) EACH(infer) EACH(as_tensor) EACH(builder) EACH(count)    \
    EACH(raised) EACH(left) EACH(marks) EACH(kept) EACH(nothing)

#define TAKE(name) way->name = Py_XNewRef(given.name);
#define LET_GO(name) Py_CLEAR(way->name);
#define VISIT(name) Py_VISIT(way->name);

static PyObject *
way_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {
        "facts", "questions", "match", "holds", "sizes",   "fits",      "engine", "pool",
        "waiting", "slots",   "slot",  "bound", "infer",   "as_tensor", "checked", "builder",
        "count", "raised",    "left",  "marks", "kept",    "looked_at", "heads",  NULL,
    };
    Way given = {0}, *way; /* its references are borrowed */
    PyObject *looked_at, *heads;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "$O!O!OOO!OOOO!nOlOOpOOOOSOO!O!", names, &PyTuple_Type, &given.facts,
            &PyTuple_Type, &given.questions, &given.match, &given.holds, &PyTuple_Type,
            &given.sizes, &given.fits, &given.engine, &given.pool, &PyList_Type, &given.waiting,
            &given.slots, &given.slot, &given.bound, &given.infer, &given.as_tensor,
            &given.checked, &given.builder, &given.count, &given.raised, &given.left,
            &given.marks, &given.kept, &PyTuple_Type, &looked_at, &PyTuple_Type, &heads)) {
        return NULL;
    }
    if (!are_tuples_of(given.facts, 3) || !are_tuples_of(given.questions, 2)) {
        return NULL;
    }
    way = (Way *)type->tp_alloc(type, 0);
    if (way == NULL) {
        return NULL;
    }
    REFERENCES(TAKE)
    way->slots = given.slots;
    way->bound = given.bound;
    way->checked = given.checked;
    way->nothing = PyDict_New();
    if (way->nothing == NULL || memory_of(looked_at, &way->looked_at, &way->many_looked_at) < 0
        || memory_of(heads, &way->heads, &way->many_heads) < 0) {
        Py_DECREF(way);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < way->many_heads; i++) {
        if (way->heads[i].length < 1 || way->heads[i].length > MARKED_BYTES) {
            PyErr_Format(PyExc_ValueError, "A head has 1 to %d bytes.", MARKED_BYTES);
            Py_DECREF(way);
            return NULL;
        }
    }
    return (PyObject *)way;
}

static int
way_traverse(Way *way, visitproc visit, void *arg)
{
    REFERENCES(VISIT)
    return 0;
}

/* No tp_clear: a way is never changed, so that a call may go by one that was given up meanwhile.
   Cycles through it go through its Shortcut, which lets it go. */
static void
way_dealloc(Way *way)
{
    PyObject_GC_UnTrack(way);
    REFERENCES(LET_GO)
    PyMem_Free(way->looked_at);
    PyMem_Free(way->heads);
    Py_TYPE(way)->tp_free((PyObject *)way);
}

PyTypeObject way_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ovshim._hot.Way",
    .tp_doc = "What a Shortcut takes for granted, and how it answers.",
    .tp_basicsize = sizeof(Way),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = way_new,
    .tp_traverse = (traverseproc)way_traverse,
    .tp_dealloc = (destructor)way_dealloc,
};
