/* Calls at rest: those that eager serves because it is faster go to the module's method at a glance
   (`ovshim/rest.py`). */

#include "hot.h"

#include <stddef.h>
#include <structmember.h>

#define REFERENCES(EACH)                                                                         \
    EACH(facts) EACH(questions) EACH(glance) EACH(sizes) EACH(tensor) EACH(dtypes) EACH(counts)  \
    EACH(module) EACH(name) EACH(function) EACH(method)

#define TAKE(name) rest->name = Py_NewRef(given.name);
#define LET_GO(name) Py_CLEAR(rest->name);
#define VISIT(name) Py_VISIT(rest->name);

static PyObject *name_dtype, *name_shape;

int
make_names_of_rests(void)
{
    Name names[] = {
        {&name_dtype, "dtype"},
        {&name_shape, "shape"},
    };
    return make_names(names, sizeof(names) / sizeof(*names));
}

static PyObject *
rest_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"left",   "facts",  "questions", "glance", "sizes",    "tensor",
                            "dtypes", "counts", "module",    "name",   "function", "method", NULL};
    Rest given = {0}; /* its references are borrowed */
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$nO!O!OO!OO!O!OUOO", names, &given.left,
                                     &PyTuple_Type, &given.facts, &PyTuple_Type,
                                     &given.questions, &given.glance, &PyTuple_Type,
                                     &given.sizes, &given.tensor, &PyTuple_Type, &given.dtypes,
                                     &PyTuple_Type, &given.counts, &given.module, &given.name,
                                     &given.function, &given.method)) {
        return NULL;
    }
    if (!are_tuples_of(given.facts, 3) || !are_tuples_of(given.questions, 2)) {
        return NULL;
    }
    for (Py_ssize_t i = 0; given.glance == Py_None && i < PyTuple_GET_SIZE(given.sizes); i++) {
        PyObject *sizes = PyTuple_GET_ITEM(given.sizes, i);
        if (!PyTuple_Check(sizes) || PyTuple_GET_SIZE(sizes) != PyTuple_GET_SIZE(given.dtypes)) {
            PyErr_SetString(PyExc_ValueError, "Each tensor has a dtype and sizes.");
            return NULL;
        }
    }
    Rest *rest = (Rest *)type->tp_alloc(type, 0);
    if (rest != NULL) {
        rest->left = given.left;
        REFERENCES(TAKE)
    }
    return (PyObject *)rest;
}

/* The shape of a tensor of this dtype; NULL for another, without an exception. */
static PyObject *
shape_of(Rest *rest, PyObject *tensor, PyObject *dtype)
{
    if ((PyObject *)Py_TYPE(tensor) != rest->tensor) {
        return NULL;
    }
    PyObject *now = PyObject_GetAttr(tensor, name_dtype);
    Py_XDECREF(now); /* it is compared with what is held */
    return now == dtype ? PyObject_GetAttr(tensor, name_shape) : NULL;
}

/* Whether the arguments are tensors of these dtypes and some of the sizes, and no others: 1 for
   yes, 0 for no, -1 with an exception; as all of these. */
static int
are_such_tensors(Rest *rest, PyObject *args, PyObject *kwargs)
{
    Py_ssize_t many = PyTuple_GET_SIZE(rest->dtypes);
    if (!PyTuple_Check(args) || PyTuple_GET_SIZE(args) != many || !PyDict_Check(kwargs)
        || PyDict_GET_SIZE(kwargs) != 0) {
        return 0;
    }
    PyObject *sizes = PyTuple_New(many);
    for (Py_ssize_t i = 0; sizes != NULL && i < many; i++) {
        PyObject *dtype = PyTuple_GET_ITEM(rest->dtypes, i);
        PyObject *shape = shape_of(rest, PyTuple_GET_ITEM(args, i), dtype);
        if (shape == NULL) {
            Py_CLEAR(sizes);
        } else {
            PyTuple_SET_ITEM(sizes, i, shape);
        }
    }
    if (sizes == NULL) {
        return PyErr_Occurred() ? -1 : 0;
    }
    int same = PySequence_Contains(rest->sizes, sizes);
    Py_DECREF(sizes);
    return same;
}

static int
looks_alike(Rest *rest, PyObject *args, PyObject *kwargs)
{
    if (rest->glance == Py_None) {
        return are_such_tensors(rest, args, kwargs);
    }
    PyObject *arguments[] = {args, kwargs};
    PyObject *sizes = PyObject_Vectorcall(rest->glance, arguments, 2, NULL);
    if (sizes == NULL) {
        return -1;
    }
    int same = PySequence_Contains(rest->sizes, sizes);
    Py_DECREF(sizes);
    return same;
}

/* Whether the class has this very method still: it may be replaced there, by one that says it is
   equal. */
static int
has_its_method(Rest *rest)
{
    PyObject *now = PyObject_GetAttr((PyObject *)Py_TYPE(rest->module), rest->name);
    Py_XDECREF(now); /* it is compared with what is held */
    return now == NULL ? -1 : now == rest->function;
}

static int
count(Rest *rest)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(rest->counts); i++) {
        PyObject *counted = PyObject_CallNoArgs(PyTuple_GET_ITEM(rest->counts, i));
        if (counted == NULL) {
            return -1;
        }
        Py_DECREF(counted);
    }
    return 1;
}

PyObject *
answer_at_rest(Rest *rest, PyObject *args, PyObject *kwargs)
{
    /* The questions before anything is asked of a tensor: a mode would see it. */
    if (rest->left <= 0 || facts_stand(rest->facts) != 1 || questions_stand(rest->questions) != 1
        || looks_alike(rest, args, kwargs) != 1 || has_its_method(rest) != 1) {
        return NULL;
    }
    rest->left--;
    return count(rest) == 1 ? PyObject_Call(rest->method, args, kwargs) : NULL;
}

static int
rest_traverse(Rest *rest, visitproc visit, void *arg)
{
    REFERENCES(VISIT)
    return 0;
}

/* No tp_clear: as with ways, cycles go through its Shortcut. */
static void
rest_dealloc(Rest *rest)
{
    PyObject_GC_UnTrack(rest);
    REFERENCES(LET_GO)
    Py_TYPE(rest)->tp_free((PyObject *)rest);
}

static PyMemberDef rest_members[] = {
    {"left", T_PYSSIZET, offsetof(Rest, left), 0, "So many calls may follow."},
    {NULL},
};

PyTypeObject rest_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ovshim._hot.Rest",
    .tp_doc = "Some calls that eager serves, each like one that it has served.",
    .tp_basicsize = sizeof(Rest),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = rest_new,
    .tp_members = rest_members,
    .tp_traverse = (traverseproc)rest_traverse,
    .tp_dealloc = (destructor)rest_dealloc,
};
