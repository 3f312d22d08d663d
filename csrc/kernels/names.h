// The name of a variant, as text and as its table's symbol.
#pragma once

#include "kernels.h"

#define DUO_STRING(x) #x
#define DUO_NAME_OF(x) DUO_STRING(x)
#define DUO_JOIN(a, b) a##b
#define DUO_SYMBOL_OF(x) DUO_JOIN(kernels_, x)
