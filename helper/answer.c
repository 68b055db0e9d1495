/* A call by a way: the questions of `Dispatcher.call`, and what it does with what is computed. */

#include "hot.h"

static PyObject *name_requires_grad, *name_shape;

int
make_names_of_answers(void)
{
    Name names[] = {
        {&name_requires_grad, "requires_grad"},
        {&name_shape, "shape"},
    };
    return make_names(names, sizeof(names) / sizeof(*names));
}

/* --- questions: 1 for yes, 0 for no, -1 with an exception --------------------------------- */

int
facts_stand(PyObject *facts)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(facts); i++) {
        PyObject *fact = PyTuple_GET_ITEM(facts, i);
        PyObject *now = PyObject_GetAttr(PyTuple_GET_ITEM(fact, 0), PyTuple_GET_ITEM(fact, 1));
        if (now == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Clear();
            return 0;
        }
        if (now == NULL) {
            return -1; /* a module's class may answer with code of its own, which is interrupted */
        }
        Py_DECREF(now);
        if (now != PyTuple_GET_ITEM(fact, 2)) {
            return 0;
        }
    }
    return 1;
}

int
questions_stand(PyObject *questions)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(questions); i++) {
        PyObject *question = PyTuple_GET_ITEM(questions, i);
        PyObject *now = PyObject_CallNoArgs(PyTuple_GET_ITEM(question, 0));
        if (now == NULL) {
            return -1;
        }
        Py_DECREF(now);
        if (now != PyTuple_GET_ITEM(question, 1)) {
            return 0;
        }
    }
    return 1;
}

static int
sizes_are(Way *way, PyObject *tensors)
{
    if (!PyTuple_Check(tensors) || PyTuple_GET_SIZE(tensors) != PyTuple_GET_SIZE(way->sizes)) {
        return 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); i++) {
        PyObject *tensor = PyTuple_GET_ITEM(tensors, i);
        PyObject *wants_grad = PyObject_GetAttr(tensor, name_requires_grad);
        if (wants_grad == NULL) {
            return -1;
        }
        Py_DECREF(wants_grad);
        if (wants_grad != Py_False) {
            return 0;
        }
        PyObject *shape = PyObject_GetAttr(tensor, name_shape);
        if (shape == NULL) {
            return -1;
        }
        int same = PyObject_RichCompareBool(shape, PyTuple_GET_ITEM(way->sizes, i), Py_EQ);
        Py_DECREF(shape);
        if (same != 1) {
            return same;
        }
    }
    return 1;
}

/* What a function says, of an argument if there is one. None is no function, and has nothing against
   it. */
static int
is_so(PyObject *function, PyObject *argument)
{
    if (function == Py_None) {
        return 1;
    }
    PyObject *said = argument == NULL ? PyObject_CallNoArgs(function)
                                      : PyObject_CallOneArg(function, argument);
    if (said == NULL) {
        return -1;
    }
    int truth = PyObject_IsTrue(said);
    Py_DECREF(said);
    return truth;
}

/* --- an answer --------------------------------------------------------------------------- */

/* 1 where all indices were in range, as the graph itself says with the last of its outputs. */
static int
is_in_range(Way *way, PyObject *computed)
{
    Py_ssize_t many = PyList_GET_SIZE(computed);
    if (!way->checked) {
        return 1;
    }
    return many > 0 ? PyObject_IsTrue(PyList_GET_ITEM(computed, many - 1)) : 0;
}

/* The module's output; NULL as above. */
static PyObject *
built(Way *way, PyObject *computed, PyObject *tensors)
{
    PyObject *arguments[] = {computed, tensors}, *answer = NULL;
    if (way->builder != Py_None) {
        answer = PyObject_Vectorcall(way->builder, arguments, 2, NULL);
    }
    else if (PyList_GET_SIZE(computed) > 0) {
        answer = Py_NewRef(PyList_GET_ITEM(computed, 0));
    }
    if (answer == NULL) {
        if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception)) {
            PyObject *error = caught();
            Py_XDECREF(PyObject_CallOneArg(way->raised, error));
            Py_DECREF(error);
        }
        return NULL;
    }
    PyObject *counted = PyObject_CallNoArgs(way->count);
    if (counted == NULL) {
        Py_CLEAR(answer);
    }
    Py_XDECREF(counted);
    return answer;
}

PyObject *
answer_by(Way *way, PyObject *args, PyObject *kwargs)
{
    if (facts_stand(way->facts) != 1) {
        return NULL;
    }
    /* Before anything is asked of a tensor: a mode would see it. */
    if (questions_stand(way->questions) != 1) {
        return NULL;
    }
    PyObject *arguments[] = {args, kwargs}, *answer = NULL, *computed = NULL;
    PyObject *tensors = PyObject_Vectorcall(way->match, arguments, 2, NULL);
    if (tensors != NULL && sizes_are(way, tensors) == 1 && is_so(way->holds, NULL) == 1
        && is_so(way->fits, tensors) == 1) {
        computed = computed_of(way, tensors);
    }
    if (computed != NULL) {
        answer = is_in_range(way, computed) != 1 ? NULL : built(way, computed, tensors);
        Py_DECREF(computed);
    }
    Py_XDECREF(tensors);
    return answer;
}
