#include "../common/version.h"

VISATTN_MARK_LIBRARY
