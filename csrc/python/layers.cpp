// The native form of `_is_untouched` in visattn_fast/reference/as_built.py, for every Python from 3.10 on: on small maps
// the time of the question shows. It says yes only where the Python form does. Where it says no, Python decides.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

namespace {

constexpr Py_ssize_t kMostLayers = 32;

// Indices of the fields of `_Step` and of `Fit`.
enum Step { kParent, kKey, kKinds, kFits, kChildren };
enum Fit { kNames, kAllowed, kParameters };

// Keys of a module's __dict__.
PyObject *modules_key, *parameters_key, *forward_key, *hooks_keys[4];

// All objects below are borrowed, unless a comment says otherwise.

// On anything but a dict, these two set an error, and nothing is found.
PyObject* value_of(PyObject* dict, PyObject* key) {
  return dict ? PyDict_GetItemWithError(dict, key) : nullptr;
}

bool is_empty(PyObject* dict) { return dict && PyDict_Size(dict) == 0; }

// True if the object's type is one of these exactly.
bool is_one_of(PyObject* kinds, PyObject* object) {
  const auto kind = reinterpret_cast<PyObject*>(Py_TYPE(object));
  for (Py_ssize_t i = 0, count = PyTuple_Size(kinds); i < count; ++i)
    if (PyTuple_GetItem(kinds, i) == kind) return true;
  return false;
}

// True if every parameter is None or of one of these types exactly.
bool are_plain(PyObject* parameters, PyObject* plain) {
  if (!parameters || !PyDict_Check(parameters)) return false;
  Py_ssize_t position = 0;
  PyObject *name, *parameter;
  while (PyDict_Next(parameters, &position, &name, &parameter))
    if (parameter != Py_None && !is_one_of(plain, parameter)) return false;
  return true;
}

bool has(PyObject* d, PyObject* name) {
  PyObject* own = value_of(value_of(d, parameters_key), name);
  if (own && own != Py_None) return true;
  PyObject* kept = value_of(d, name);
  return kept && kept != Py_None;
}

// `Fit.__call__`.
bool has_settings(PyObject* d, PyObject* fit) {
  PyObject *names = PyTuple_GetItem(fit, kNames), *parameters = PyTuple_GetItem(fit, kParameters);
  if (Py_ssize_t count = PyTuple_Size(names)) {
    PyObject* first = value_of(d, PyTuple_GetItem(names, 0));
    if (!first) return false;
    PyObject* others = value_of(PyTuple_GetItem(fit, kAllowed), first);
    if (!others) return false;
    for (Py_ssize_t i = 1; i < count; ++i) {
      PyObject* value = value_of(d, PyTuple_GetItem(names, i));
      if (!value || PyObject_RichCompareBool(value, PyTuple_GetItem(others, i - 1), Py_EQ) != 1) return false;
    }
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(parameters); ++i) {
    PyObject* pair = PyTuple_GetItem(parameters, i);
    if (has(d, PyTuple_GetItem(pair, 0)) != (PyTuple_GetItem(pair, 1) == Py_True)) return false;
  }
  return true;
}

bool fits(PyObject* d, PyObject* check) {
  if (check == Py_None) return true;
  if (PyTuple_Check(check)) return has_settings(d, check);
  PyObject* answer = PyObject_CallFunctionObjArgs(check, d, nullptr);  // new
  const bool yes = answer && PyObject_IsTrue(answer) == 1;
  Py_XDECREF(answer);
  return yes;
}

// True if a layer, of which `d` is the __dict__, is what `step` assumes.
bool is_untouched(PyObject* d, PyObject* step, PyObject* plain) {
  for (PyObject* key : hooks_keys)
    if (!is_empty(value_of(d, key))) return false;
  if (value_of(d, forward_key)) return false;
  PyObject *children = PyTuple_GetItem(step, kChildren), *below = value_of(d, modules_key);
  if (!below) return false;
  if (children != Py_None && PyLong_AsSsize_t(children) != PyDict_Size(below)) return false;
  return fits(d, PyTuple_GetItem(step, kFits)) && are_plain(value_of(d, parameters_key), plain);
}

bool untouched(PyObject* d, PyObject* steps, PyObject* own_fits, PyObject* plain, PyObject* global_hooks) {
  const Py_ssize_t count = PyTuple_Size(steps);
  if (count >= kMostLayers) return false;
  for (Py_ssize_t i = 0; i < PyTuple_Size(global_hooks); ++i)
    if (!is_empty(PyTuple_GetItem(global_hooks, i))) return false;
  if (!fits(d, own_fits) || !are_plain(value_of(d, parameters_key), plain)) return false;
  PyObject* found[kMostLayers] = {value_of(d, modules_key)};
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* step = PyTuple_GetItem(steps, i);
    const Py_ssize_t parent = PyLong_AsSsize_t(PyTuple_GetItem(step, kParent));
    if (parent < 0 || parent > i) return false;
    PyObject* inner = value_of(found[parent], PyTuple_GetItem(step, kKey));
    if (!inner) inner = Py_None;
    if (!is_one_of(PyTuple_GetItem(step, kKinds), inner)) return false;
    found[i + 1] = nullptr;
    if (inner == Py_None) continue;
    PyObject* dict = PyObject_GenericGetDict(inner, nullptr);  // new; the layer keeps it
    if (!dict) return false;
    Py_DECREF(dict);
    if (!is_untouched(dict, step, plain)) return false;
    found[i + 1] = value_of(dict, modules_key);
  }
  return true;
}

PyObject* py_untouched(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "untouched takes (dict, steps, fits, plain, global_hooks)");
    return nullptr;
  }
  const bool yes = PyTuple_Check(given[1]) && PyTuple_Check(given[4]) &&
                   untouched(given[0], given[1], given[2], given[3], given[4]);
  PyErr_Clear();  // the Python form meets the same error, and raises it
  return PyBool_FromLong(yes);
}

PyMethodDef methods[] = {{"untouched", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_untouched)),
                          METH_FASTCALL, "Returns True if the layers are as built."},
                         {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_layers", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__layers() {
  modules_key = PyUnicode_InternFromString("_modules");
  parameters_key = PyUnicode_InternFromString("_parameters");
  forward_key = PyUnicode_InternFromString("forward");
  const char* hooks[] = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"};
  for (int i = 0; i < 4; ++i) hooks_keys[i] = PyUnicode_InternFromString(hooks[i]);
  return PyModule_Create(&definition);
}
