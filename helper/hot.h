/* The hot path as one piece of machine code.

After an inference little of an interpreter's own code is in the caches, and each step of the hot
path in Python waits for it. Here are the same steps in a few cache lines: 6 us less beside a graph
of 9 us (Xeon of family 6, model 207).

Nothing is decided here. A `Shortcut` answers a call where every question of the hot path is
answered as it was when its `Way` was laid (`ovshim/shortcut.py`); where one is not, or anything is
in doubt, it calls Python's own road, which asks all of them again.

    way.c       what is taken for granted, and how it is answered then
    answer.c    a call by a way
    inference.c what is computed for it
    rest.c      a call that is eager's
    shortcut.c  the callable, and the module
    words.c     words of memory, for `ovshim/untouched.py` and `ovshim/values.py`
*/

#ifndef OVSHIM_HOT_H
#define OVSHIM_HOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

typedef struct {
    char *start;
    Py_ssize_t length;
} Memory;

typedef struct Way {
    PyObject_HEAD
    PyObject *facts;     /* ((owner, name, value), ...): owner.name is value */
    PyObject *questions; /* ((callable, answer), ...): callable() is answer */
    PyObject *match;     /* match(args, kwargs) -> tensors or None */
    PyObject *holds;     /* holds() -> bool: whether the module is what it was */
    PyObject *sizes;     /* the sizes of each tensor */
    PyObject *fits;      /* fits(tensors) -> bool, or None where there is nothing to ask */
    PyObject *engine;
    PyObject *pool;
    PyObject *waiting;   /* the pool's list of slots that wait */
    Py_ssize_t slots;    /* how many have to wait; -1: any number */
    PyObject *slot;      /* a weak reference */
    long bound;          /* the slot's own count of what was bound to it */
    PyObject *infer;     /* infer(request, {}, False, False) -> arrays */
    PyObject *nothing;   /* {} */
    PyObject *as_tensor;
    int checked;         /* whether the last tensor computed says that all indices were in range */
    PyObject *builder;   /* builder(computed, tensors) -> the module's output; None: the tensor */
    PyObject *count;
    PyObject *raised;    /* raised(error): raises it where it is not ours to keep */
    PyObject *left;      /* left(slot, error, ran): takes a slot back from a call that failed */
    PyObject *marks;     /* bytes; none where nothing is marked */
    PyObject *kept;      /* what the memory below belongs to */
    Memory *looked_at;   /* float32 */
    Py_ssize_t many_looked_at;
    Memory *heads;
    Py_ssize_t many_heads;
    unsigned long thread; /* that holds the slot, while one does by this way */
    struct Way *next;     /* of those whose slots are held */
} Way;

/* Some calls that eager serves because it is faster. */
typedef struct {
    PyObject_HEAD
    Py_ssize_t left;     /* so many may follow */
    PyObject *facts;     /* these two as of a way */
    PyObject *questions;
    PyObject *glance;    /* glance(args, kwargs) -> sizes or None; None: all arguments are tensors */
    PyObject *sizes;     /* (sizes of each tensor, ...), of which a call has some */
    PyObject *tensor;    /* their class */
    PyObject *dtypes;
    PyObject *counts;    /* (count, ...), called for each */
    PyObject *module;
    PyObject *name;      /* of the module's method */
    PyObject *function;  /* what its class has under that name */
    PyObject *method;    /* and that bound to it */
} Rest;

/* Of an output, as `single.py` marks it. */
#define MARKED_BYTES 8

extern PyTypeObject way_type;
extern PyTypeObject rest_type;

/* What a call by a way answers. NULL where Python is to answer it, and with an exception where the
   caller is to have that. */
PyObject *answer_by(Way *way, PyObject *args, PyObject *kwargs);

/* Eager's answer to a call at rest; NULL as above. */
PyObject *answer_at_rest(Rest *rest, PyObject *args, PyObject *kwargs);

/* 1 for yes, 0 for no, -1 with an exception. */
int facts_stand(PyObject *facts);
int questions_stand(PyObject *questions);

/* Whether all items are tuples of so many, with names in facts; else TypeError. */
int are_tuples_of(PyObject *items, Py_ssize_t many);

/* What is computed of these tensors. NULL where Python is to see to it, and with an exception where
   the caller is to have it. The slot is back with its pool in any case. */
PyObject *computed_of(Way *way, PyObject *tensors);

/* The exception that is set, which is set no more: a new reference. */
PyObject *caught(void);

/* Names of attributes, made when the module is: -1 with an exception. */
typedef struct {
    PyObject **name;
    const char *text;
} Name;

int make_names(const Name *names, size_t many);
int make_names_of_answers(void);
int make_names_of_inferences(void);
int make_names_of_rests(void);

PyObject *holders(PyObject *module, PyObject *pool);
PyObject *forget_held(PyObject *module, PyObject *unused);
PyObject *read_words(PyObject *module, PyObject *addresses);
PyObject *same_words(PyObject *module, PyObject *state);
PyObject *all_within(PyObject *module, PyObject *const *given, Py_ssize_t many);

#endif
