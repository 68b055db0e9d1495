/* The callable that answers by a way, at rest, or by the road; and the module. */

#include "hot.h"

#include <stddef.h>
#include <structmember.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *road;
    PyObject *way;
    PyObject *rest;
    Py_ssize_t missed;
} Shortcut;

static PyObject *
shortcut_call(PyObject *callable, PyObject *const *stack, size_t nargsf, PyObject *names)
{
    Shortcut *self = (Shortcut *)callable;
    int usual = names == NULL && PyVectorcall_NARGS(nargsf) == 2;
    PyObject *way = self->way;
    if (usual && way != Py_None) {
        Py_INCREF(way); /* it may be given up while it answers */
        PyObject *answer = answer_by((Way *)way, stack[0], stack[1]);
        Py_DECREF(way);
        if (answer != NULL || PyErr_Occurred()) {
            return answer;
        }
    }
    PyObject *rest = self->rest;
    if (usual && rest != Py_None) {
        Py_INCREF(rest);
        PyObject *answer = answer_at_rest((Rest *)rest, stack[0], stack[1]);
        Py_DECREF(rest);
        if (answer != NULL || PyErr_Occurred()) {
            return answer;
        }
    }
    self->missed++;
    return PyObject_Vectorcall(self->road, stack, nargsf, names);
}

static PyObject *
shortcut_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"road", NULL};
    PyObject *road;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &road)) {
        return NULL;
    }
    Shortcut *self = (Shortcut *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->vectorcall = shortcut_call;
        self->road = Py_NewRef(road);
        self->way = Py_NewRef(Py_None);
        self->rest = Py_NewRef(Py_None);
    }
    return (PyObject *)self;
}

static int
set_to(PyObject **place, PyObject *given, PyTypeObject *type)
{
    if (given == NULL || (given != Py_None && !Py_IS_TYPE(given, type))) {
        PyErr_Format(PyExc_TypeError, "This is a %s, or None.", strrchr(type->tp_name, '.') + 1);
        return -1;
    }
    PyObject *before = *place;
    *place = Py_NewRef(given);
    Py_DECREF(before);
    return 0;
}

static PyObject *
shortcut_way(Shortcut *self, void *closure)
{
    return Py_NewRef(self->way);
}

static int
shortcut_set_way(Shortcut *self, PyObject *way, void *closure)
{
    return set_to(&self->way, way, &way_type);
}

static PyObject *
shortcut_rest(Shortcut *self, void *closure)
{
    return Py_NewRef(self->rest);
}

static int
shortcut_set_rest(Shortcut *self, PyObject *rest, void *closure)
{
    return set_to(&self->rest, rest, &rest_type);
}

static int
shortcut_traverse(Shortcut *self, visitproc visit, void *arg)
{
    Py_VISIT(self->road);
    Py_VISIT(self->way);
    Py_VISIT(self->rest);
    return 0;
}

static int
shortcut_clear(Shortcut *self)
{
    PyObject *way = self->way, *rest = self->rest;
    self->way = Py_NewRef(Py_None);
    self->rest = Py_NewRef(Py_None);
    Py_XDECREF(way);
    Py_XDECREF(rest);
    return 0; /* the road leads to an object of Python's, which is cleared itself */
}

static void
shortcut_dealloc(Shortcut *self)
{
    PyObject_GC_UnTrack(self);
    Py_XDECREF(self->road);
    Py_XDECREF(self->way);
    Py_XDECREF(self->rest);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMemberDef shortcut_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Shortcut, vectorcall), READONLY, NULL},
    {"missed", T_PYSSIZET, offsetof(Shortcut, missed), 0, "Calls that went by the road."},
    {"road", T_OBJECT_EX, offsetof(Shortcut, road), READONLY, "Answers every other call."},
    {NULL},
};

static PyGetSetDef shortcut_attributes[] = {
    {"way", (getter)shortcut_way, (setter)shortcut_set_way, "A Way, or None.", NULL},
    {"rest", (getter)shortcut_rest, (setter)shortcut_set_rest, "A Rest, or None.", NULL},
    {NULL},
};

static PyTypeObject shortcut_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ovshim._hot.Shortcut",
    .tp_doc = "Shortcut(road): a callable (args, kwargs), by its way, at rest, or by the road.",
    .tp_basicsize = sizeof(Shortcut),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = shortcut_new,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Shortcut, vectorcall),
    .tp_members = shortcut_members,
    .tp_getset = shortcut_attributes,
    .tp_traverse = (traverseproc)shortcut_traverse,
    .tp_clear = (inquiry)shortcut_clear,
    .tp_dealloc = (destructor)shortcut_dealloc,
};

/* --- what the other files share ----------------------------------------------------------- */

int
make_names(const Name *names, size_t many)
{
    for (size_t i = 0; i < many; i++) {
        *names[i].name = PyUnicode_InternFromString(names[i].text);
        if (*names[i].name == NULL) {
            return -1;
        }
    }
    return 0;
}

/* The exception that is set, which is set no more: a new reference. */
PyObject *
caught(void)
{
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (trace != NULL && error != NULL) {
        PyException_SetTraceback(error, trace);
    }
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return error;
#endif
}

/* --- the module --------------------------------------------------------------------------- */

/* Counted up with each change of what Python calls: see `ovshim/helper.py`. */
#define INTERFACE 6

static PyMethodDef functions[] = {
    {"read_words", read_words, METH_O,
     "read_words(addresses) -> bytes: the eight bytes at each of the addresses, which are bytes."},
    {"same_words", same_words, METH_O,
     "same_words(state) -> bool: whether words are what they were; state is (addresses, words,"
     " ...), each bytes, as far as it is."},
    {"all_within", (PyCFunction)(void (*)(void))all_within, METH_FASTCALL,
     "all_within(address, many, low, high) -> bool: whether so many integers of 64 bits are between"
     " these, or are these."},
    {"holders", holders, METH_O,
     "holders(pool) -> list[int]: the threads that are inside of a Shortcut which holds one of its"
     " slots."},
    {"forget_held", forget_held, METH_NOARGS,
     "forget_held(): in a child, where the threads are not that held any."},
    {NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ovshim._hot",
    .m_doc = "The hot path as one piece of machine code.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC
PyInit__hot(void)
{
    if (make_names_of_answers() < 0 || make_names_of_inferences() < 0
        || make_names_of_rests() < 0
        || PyType_Ready(&way_type) < 0 || PyType_Ready(&rest_type) < 0
        || PyType_Ready(&shortcut_type) < 0) {
        return NULL;
    }
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL || PyModule_AddObjectRef(module, "Way", (PyObject *)&way_type) < 0
        || PyModule_AddObjectRef(module, "Rest", (PyObject *)&rest_type) < 0
        || PyModule_AddObjectRef(module, "Shortcut", (PyObject *)&shortcut_type) < 0
        || PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) < 0) {
        Py_XDECREF(module);
        return NULL;
    }
    return module;
}
