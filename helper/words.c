/* Words of memory, read at their addresses. */

#include "hot.h"

PyObject *
read_words(PyObject *module, PyObject *addresses)
{
    if (!PyBytes_Check(addresses)) {
        PyErr_SetString(PyExc_TypeError, "Addresses are bytes, eight for each.");
        return NULL;
    }
    Py_ssize_t many = PyBytes_GET_SIZE(addresses) / (Py_ssize_t)sizeof(uint64_t);
    PyObject *found = PyBytes_FromStringAndSize(NULL, many * (Py_ssize_t)sizeof(uint64_t));
    if (found == NULL) {
        return NULL;
    }
    const uint64_t *at = (const uint64_t *)PyBytes_AS_STRING(addresses);
    uint64_t *words = (uint64_t *)PyBytes_AS_STRING(found);
    for (Py_ssize_t i = 0; i < many; i++) {
        words[i] = *(const uint64_t *)(uintptr_t)at[i];
    }
    return found;
}

/* Group by group: the words of one may be the addresses of the next. In a group there is no way out
   before its end, so that the processor waits for all of it at once. */
PyObject *
same_words(PyObject *module, PyObject *state)
{
    if (!PyTuple_Check(state)) {
        PyErr_SetString(PyExc_TypeError, "Addresses and words are a tuple.");
        return NULL;
    }
    for (Py_ssize_t k = 0; k + 1 < PyTuple_GET_SIZE(state); k += 2) {
        PyObject *addresses = PyTuple_GET_ITEM(state, k), *known = PyTuple_GET_ITEM(state, k + 1);
        if (!PyBytes_Check(addresses)) {
            break; /* what follows is no group */
        }
        if (!PyBytes_Check(known) || PyBytes_GET_SIZE(known) != PyBytes_GET_SIZE(addresses)) {
            PyErr_SetString(PyExc_TypeError, "There is a word for each address.");
            return NULL;
        }
        const uint64_t *at = (const uint64_t *)PyBytes_AS_STRING(addresses);
        const uint64_t *words = (const uint64_t *)PyBytes_AS_STRING(known);
        Py_ssize_t many = PyBytes_GET_SIZE(addresses) / (Py_ssize_t)sizeof(uint64_t);
        uint64_t changed = 0;
        for (Py_ssize_t i = 0; i < many; i++) {
            changed |= *(const uint64_t *)(uintptr_t)at[i] ^ words[i];
        }
        if (changed) {
            Py_RETURN_FALSE;
        }
    }
    Py_RETURN_TRUE;
}

/* Without a way out of the loop, so that it is several at a time. They need not be aligned: what a
   tensor is made of may begin anywhere. */
PyObject *
all_within(PyObject *module, PyObject *const *given, Py_ssize_t many)
{
    if (many != 4) {
        PyErr_SetString(PyExc_TypeError, "An address, a number of integers, and two limits.");
        return NULL;
    }
    const char *at = PyLong_AsVoidPtr(given[0]);
    Py_ssize_t count = PyLong_AsSsize_t(given[1]);
    int64_t low = PyLong_AsLongLong(given[2]), high = PyLong_AsLongLong(given[3]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    int outside = at == NULL && count > 0; /* of a tensor whose memory was taken away */
    for (Py_ssize_t i = 0; i < count && at != NULL; i++) {
        int64_t value;
        memcpy(&value, at + i * (Py_ssize_t)sizeof(value), sizeof(value));
        outside |= (value < low) | (value > high);
    }
    return PyBool_FromLong(!outside);
}
