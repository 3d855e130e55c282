// The version of the package. Python looks for this text in the file of a library before it loads it: a kernel of
// another version may take other arguments.
extern "C" {
__attribute__((visibility("default"))) extern const char visattn_fast_version[];
const char visattn_fast_version[] = "visattn_fast library 0.1.0";
}
