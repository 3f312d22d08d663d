// Threads of the OpenMP runtime that the process has already loaded.
#pragma once

#include <memory>
#include <type_traits>

namespace duo {

// Threads that a parallel region of this thread would get now; 1 inside a region and where the
// process has no OpenMP runtime.
int max_threads();

// File of the runtime in use, empty where there is none.
const char* openmp_library();

// Calls run(context, thread) once on each of `threads` threads, the calling one among them.
void parallel(int threads, void (*run)(void* context, int thread), void* context);

template <typename Function>
void parallel(int threads, Function&& function) {
    parallel(
        threads,
        [](void* context, int thread) {
            (*static_cast<std::remove_reference_t<Function>*>(context))(thread);
        },
        const_cast<void*>(static_cast<const void*>(std::addressof(function))));
}

}  // namespace duo
