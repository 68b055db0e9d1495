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
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(pairs, i), "Kn", &start, &(*memory)[i].length)) {
            return -1;
        }
        (*memory)[i].start = (char *)(uintptr_t)start;
    }
    return 0;
}

/* Its references, each told once. */
#define REFERENCES(EACH)                                                                         \
    EACH(facts) EACH(questions) EACH(match) EACH(sizes) EACH(fits) EACH(engine) EACH(pool)       \
    EACH(waiting) EACH(slot) EACH(infer) EACH(as_tensor) EACH(builder) EACH(count) EACH(raised)  \
    EACH(left) EACH(marks) EACH(kept) EACH(nothing)

#define KEEP(name) Py_XINCREF(way->name);
#define FORGET(name) way->name = NULL;
#define LET_GO(name) Py_CLEAR(way->name);
#define VISIT(name) Py_VISIT(way->name);

static PyObject *
way_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {
        "facts",  "questions", "match", "sizes",     "fits",    "engine",  "pool",  "waiting",
        "slots",  "slot",      "bound", "infer",     "as_tensor", "checked", "builder", "count",
        "raised", "left",      "marks", "kept",      "looked_at", "heads",  NULL,
    };
    PyObject *looked_at, *heads;
    Way *way = (Way *)type->tp_alloc(type, 0);
    if (way == NULL) {
        return NULL;
    }
    int parsed = PyArg_ParseTupleAndKeywords(
        args, kwargs, "$O!O!OO!OOOO!nOlOOpOOOOSOO!O!", names, &PyTuple_Type, &way->facts,
        &PyTuple_Type, &way->questions, &way->match, &PyTuple_Type, &way->sizes, &way->fits,
        &way->engine, &way->pool, &PyList_Type, &way->waiting, &way->slots, &way->slot,
        &way->bound, &way->infer, &way->as_tensor, &way->checked, &way->builder, &way->count,
        &way->raised, &way->left, &way->marks, &way->kept, &PyTuple_Type, &looked_at,
        &PyTuple_Type, &heads);
    if (!parsed) { /* what was parsed is borrowed */
        REFERENCES(FORGET)
        Py_DECREF(way);
        return NULL;
    }
    REFERENCES(KEEP)
    way->nothing = PyDict_New();
    if (way->nothing == NULL || memory_of(looked_at, &way->looked_at, &way->many_looked_at) < 0
        || memory_of(heads, &way->heads, &way->many_heads) < 0) {
        Py_DECREF(way);
        return NULL;
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
