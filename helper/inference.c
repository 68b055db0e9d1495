/* What `Engine.run` does: tensors into a slot of the pool, and out of it what is computed. */

#include "hot.h"

/* Sums that are kept apart, so that a compiler may add them side by side. */
#define SUMS 16

static PyObject *name_back, *name_bound, *name_copies, *name_dead, *name_request;

int
make_names_of_inferences(void)
{
    Name names[] = {
        {&name_back, "back"},
        {&name_bound, "bound"},
        {&name_copies, "copies"},
        {&name_dead, "dead"},
        {&name_request, "request"},
    };
    return make_names(names, sizeof(names) / sizeof(*names));
}

/* The ways whose slots are held. A slot is held by one call at a time, and so is a way. */
static Way *held;

static void
hold(Way *way)
{
    way->thread = PyThread_get_thread_ident();
    way->next = held;
    held = way;
}

static void
hold_no_more(Way *way)
{
    /* In a child the list was forgotten. */
    for (Way **at = &held; *at != NULL; at = &(*at)->next) {
        if (*at == way) {
            *at = way->next;
            break;
        }
    }
    way->next = NULL;
}

PyObject *
holders(PyObject *module, PyObject *pool)
{
    PyObject *threads = PyList_New(0);
    for (Way *way = held; threads != NULL && way != NULL; way = way->next) {
        if (way->pool != pool) {
            continue;
        }
        PyObject *thread = PyLong_FromUnsignedLong(way->thread);
        if (thread == NULL || PyList_Append(threads, thread) < 0) {
            Py_CLEAR(threads);
        }
        Py_XDECREF(thread);
    }
    return threads;
}

PyObject *
forget_held(PyObject *module, PyObject *unused)
{
    held = NULL;
    Py_RETURN_NONE;
}

/* --- steps: 1 where one is done, 0 where it is not to be, -1 with an exception -------------- */

/* As NumPy's product of a vector with itself: not finite for a NaN, an infinity, and what is near
   1e19 and beyond, whose square no float32 holds. */
static int
is_moderate(const Memory *memory)
{
    const float *values = (const float *)memory->start;
    Py_ssize_t i = 0, many = memory->length;
    float sums[SUMS] = {0}, sum = 0;
    for (; i + SUMS <= many; i += SUMS) {
        for (int k = 0; k < SUMS; k++) {
            sums[k] += values[i + k] * values[i + k];
        }
    }
    for (; i < many; i++) {
        sum += values[i] * values[i];
    }
    for (int k = 0; k < SUMS; k++) {
        sum += sums[k];
    }
    /* By its bits: some flags of a compiler's promise it that no number is infinite. */
    uint32_t bits;
    memcpy(&bits, &sum, sizeof(bits));
    return (bits & 0x7F800000) != 0x7F800000;
}

static PyObject *
referent(PyObject *reference) /* borrowed: who asks compares it with what it holds */
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *found = NULL;
    if (PyWeakref_GetRef(reference, &found) < 0) {
        PyErr_Clear();
    }
    Py_XDECREF(found);
    return found;
#else
    return PyWeakref_GetObject(reference);
#endif
}

/* The slot, which nobody else has from here on; NULL where it is not there as it was. */
static PyObject *
slot_of(Way *way)
{
    Py_ssize_t many = PyList_GET_SIZE(way->waiting);
    if (many == 0 || (way->slots >= 0 && many != way->slots)) {
        return NULL;
    }
    PyObject *slot = PyList_GET_ITEM(way->waiting, many - 1);
    if (slot != referent(way->slot)) {
        return NULL;
    }
    PyObject *bound = PyObject_GetAttr(slot, name_bound);
    long count = bound == NULL ? -1 : PyLong_AsLong(bound);
    Py_XDECREF(bound);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return NULL;
    }
    if (count != way->bound || PyList_GET_SIZE(way->waiting) != many
        || PyList_GET_ITEM(way->waiting, many - 1) != slot) {
        return NULL;
    }
    Py_INCREF(slot);
    if (PyList_SetSlice(way->waiting, many - 1, many, NULL) < 0) {
        PyErr_Clear();
        Py_DECREF(slot);
        return NULL;
    }
    return slot;
}

static int
copies_in(PyObject *slot, PyObject *tensors)
{
    int done = -1;
    PyObject *copies = PyObject_GetAttr(slot, name_copies);
    if (copies == NULL) {
        return -1;
    }
    Py_ssize_t many = PyTuple_GET_SIZE(tensors);
    if (!PyList_Check(copies) || PyList_GET_SIZE(copies) != many) {
        PyErr_SetString(PyExc_RuntimeError, "A slot has not as many inputs as there are tensors.");
        goto end;
    }
    for (Py_ssize_t i = 0; i < many; i++) {
        PyObject *tensor = PyTuple_GET_ITEM(tensors, i);
        PyObject *copied = PyObject_CallOneArg(PyList_GET_ITEM(copies, i), tensor);
        if (copied == NULL) {
            goto end;
        }
        Py_DECREF(copied);
    }
    done = 1;
end:
    Py_DECREF(copies);
    return done;
}

static int
is_marked(const Memory *head, char mark)
{
    char whole[MARKED_BYTES];
    memset(whole, mark, sizeof(whole));
    return memcmp(head->start, whole, (size_t)head->length) == 0;
}

/* What OpenVINO returns; NULL without an exception where it gave no output twice. */
static PyObject *
inferred(Way *way, PyObject *slot)
{
    PyObject *request = PyObject_GetAttr(slot, name_request), *results = NULL;
    if (request == NULL) {
        return NULL;
    }
    PyObject *arguments[] = {request, way->nothing, Py_False, Py_False};
    Py_ssize_t tries = PyBytes_GET_SIZE(way->marks);
    for (Py_ssize_t i = 0; results == NULL && (i < tries || i == 0); i++) {
        char mark = tries == 0 ? 0 : PyBytes_AS_STRING(way->marks)[i];
        for (Py_ssize_t k = 0; k < way->many_heads; k++) {
            memset(way->heads[k].start, mark, (size_t)way->heads[k].length);
        }
        results = PyObject_Vectorcall(way->infer, arguments, 4, NULL);
        if (results == NULL) {
            break;
        }
        for (Py_ssize_t k = 0; k < way->many_heads; k++) {
            if (is_marked(&way->heads[k], mark)) {
                Py_CLEAR(results);
                break;
            }
        }
    }
    Py_DECREF(request);
    return results;
}

static PyObject *
as_tensors(Way *way, PyObject *results)
{
    PyObject *computed = PyList_New(0), *array;
    Py_ssize_t at = 0;
    while (computed != NULL && PyDict_Next(results, &at, NULL, &array)) {
        PyObject *tensor = PyObject_CallOneArg(way->as_tensor, array);
        if (tensor == NULL || PyList_Append(computed, tensor) < 0) {
            Py_CLEAR(computed);
        }
        Py_XDECREF(tensor);
    }
    return computed;
}

static PyObject *
computed_in(Way *way, PyObject *slot, PyObject *tensors)
{
    PyObject *results = NULL, *computed = NULL;
    int ran = 0, fine = copies_in(slot, tensors);
    for (Py_ssize_t i = 0; fine == 1 && i < way->many_looked_at; i++) {
        fine = is_moderate(&way->looked_at[i]);
    }
    if (fine == 1) {
        ran = 1;
        results = inferred(way, slot);
        fine = results == NULL ? -1 : 1;
    }
    if (fine < 0) {
        PyObject *error = caught();
        PyObject *taken = PyObject_CallFunctionObjArgs(way->left, slot, error ? error : Py_None,
                                                       ran ? Py_True : Py_False, NULL);
        Py_XDECREF(taken);
        Py_XDECREF(error);
        return NULL;
    }
    PyObject *back = PyObject_GetAttr(way->pool, name_back);
    fine = back == NULL ? -1 : PyList_Append(back, slot);
    Py_XDECREF(back);
    if (fine == 0 && results != NULL) {
        /* Another thread's call may have failed meanwhile: values cannot be trusted then. */
        PyObject *dead = PyObject_GetAttr(way->engine, name_dead);
        if (dead == Py_None && PyDict_Check(results)) {
            computed = as_tensors(way, results);
        }
        Py_XDECREF(dead);
    }
    Py_XDECREF(results);
    return computed;
}

PyObject *
computed_of(Way *way, PyObject *tensors)
{
    PyObject *slot = slot_of(way);
    if (slot == NULL) {
        return NULL;
    }
    hold(way);
    PyObject *computed = computed_in(way, slot, tensors);
    hold_no_more(way);
    Py_DECREF(slot);
    return computed;
}
