// A second OpenMP runtime would bring a second pool of threads, which know neither vLLM's binding
// nor torch.set_num_threads and fight the first one for the cores. So nothing is linked: the entry
// points of the runtime that torch has loaded (or that the user has preloaded) are looked up by
// name. GNU's, LLVM's and Intel's runtimes all export them.
#include "threads.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace duo {
namespace {

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
    std::string library;

    bool complete() const {
        return parallel && thread_num && num_threads && max_threads && in_parallel;
    }

    bool load(void* handle) {
        const auto find = [handle](auto& function, const char* name) {
            function =
                reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
        };
        find(parallel, "GOMP_parallel");
        find(thread_num, "omp_get_thread_num");
        find(num_threads, "omp_get_num_threads");
        find(max_threads, "omp_get_max_threads");
        find(in_parallel, "omp_in_parallel");
        if (!complete()) return false;
        Dl_info info;
        if (dladdr(reinterpret_cast<void*>(parallel), &info) && info.dli_fname) {
            library = info.dli_fname;
        }
        return true;
    }
};

// Runtimes that were loaded without making their symbols global.
int try_library(dl_phdr_info* info, size_t, void* data) {
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const char* file = slash ? slash + 1 : info->dlpi_name;
    for (const char* prefix : {"libgomp", "libiomp5", "libomp"}) {
        if (std::strncmp(file, prefix, std::strlen(prefix)) != 0) continue;
        void* handle = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        if (handle && static_cast<OpenMP*>(data)->load(handle)) return 1;
    }
    return 0;
}

const OpenMP& openmp() {
    static const OpenMP found = [] {
        OpenMP result;
        // What torch's and vLLM's own kernels resolve to comes first.
        if (!result.load(RTLD_DEFAULT)) dl_iterate_phdr(try_library, &result);
        return result;
    }();
    return found;
}

}  // namespace

int max_threads() {
    const OpenMP& runtime = openmp();
    if (!runtime.complete() || runtime.in_parallel()) return 1;
    return runtime.max_threads();
}

const char* openmp_library() { return openmp().library.c_str(); }

void parallel(int threads, void (*run)(void* context, int thread), void* context) {
    if (threads <= 1) {
        run(context, 0);
        return;
    }
    struct Region {
        void (*run)(void*, int);
        void* context;
        int threads;
    } region{run, context, threads};
    openmp().parallel(
        [](void* data) {
            const Region& region = *static_cast<Region*>(data);
            const OpenMP& runtime = openmp();
            // A runtime may grant fewer threads than asked for: the others' parts still get done.
            const int granted = runtime.num_threads();
            for (int i = runtime.thread_num(); i < region.threads; i += granted) {
                region.run(region.context, i);
            }
        },
        &region, static_cast<unsigned>(threads), 0);
}

}  // namespace duo
