// What the driver hands to the kernels of an instruction set: plain structs, so that code compiled for one instruction
// set shares no inline function with code compiled for another.
#pragma once

#include <cstdint>

namespace mk {

enum class Rule : int64_t { fg_sgd = 0, psi_sgd = 1, sgd_g = 2, adam_g = 3 };
enum class ManifoldCode : int64_t {
  euclidean = 0,
  sphere = 1,
  oblique = 2,
  stiefel = 3,
  scale_invariant = 4,
  grassmann = 5
};
enum class Retraction : int64_t { add = 0, projection = 1, qr = 2, polar = 3, cayley = 4, exp = 5 };
enum class View : int64_t { kernel = 0, filter = 1, matrix = 2, flat = 3 };

// Storage types; arithmetic is double for float64 and float for the others.
enum class Storage { float32, float64, bfloat16, float16 };

struct Hyper {
  double lr, momentum, dampening, weight_decay, nesterov, maximize, rho, curvature, guard, clip, beta2, eps;
};

constexpr int max_dims = 8;

// A parameter's elements: `batch` dimensions run over components, the others over the elements of one, rows (n) before
// columns (p). Weight and momentum share strides; the gradient may have others.
struct Geometry {
  int batch_dims, row_dims, dims;
  int64_t size[max_dims], weight_stride[max_dims], grad_stride[max_dims];  // batch dimensions first
  int64_t count, n, p;
  constexpr int64_t elements() const { return n * p; }
  // One component's elements without gaps, weight and gradient in the same order: it can be walked with stride 1.
  bool dense;
  // The same for one column (n elements), of which column j starts at j times the column strides.
  bool dense_columns;
};

// One group of the plan over one parameter.
struct Job {
  void* weight;
  const void* grad;
  void* momentum;  // null without a buffer
  void* variance;  // Adam-G
  Storage storage;
  const Geometry* geometry;
  const int64_t* weight_offset;  // element e of a component, in matrix order: for n p <= lane_elements
  const int64_t* grad_offset;
  bool weight_in_order, grad_in_order;  // offset[e] == e
  const int64_t* listed;                // component numbers, or null for first, first + 1, …
  int64_t first, count;
  const double* scales;
  int64_t scale_stride;
  Rule rule;
  ManifoldCode manifold;
  Retraction retraction;
  Hyper hyper;
  bool individual, bounded, first_step;
  double divisor;  // of the gradient, before everything else: AMP's scale, negative where the step goes uphill
  double* norms;   // where R is asked for ([FG] Theorem 1): one number, or one for each component where individual
  int64_t step;    // steps taken before this one

  int64_t component(int64_t k) const { return listed ? listed[k] : first + k; }
  double scale(int64_t k) const { return scales[k * scale_stride]; }
  // A single dense Euclidean component is work for several threads.
  bool in_pieces() const { return manifold == ManifoldCode::euclidean && geometry->count == 1 && geometry->dense; }
};

// Up to here a component is one lane of a register (lanes.h); longer vectors have their elements in lanes (vectors.h).
constexpr int64_t lane_elements = 256;
constexpr int64_t short_vector = 64;

// Arrays of a vector's length that its step needs.
constexpr int vector_scratch = 4;
// The same for columns in lanes of any instruction set.
constexpr int column_scratch = 3 * 16;

// Numbers of a matrix with the padding of any instruction set, and of all that a step needs beside its 2 (n + p)
// offsets.
constexpr int64_t padded_matrix(int64_t n, int64_t p) { return (n + 7) / 8 * 8 * ((p + 15) / 16 * 16); }
constexpr int64_t matrix_scratch(int64_t n, int64_t p) {
  return 3 * padded_matrix(n, p) + 2 * padded_matrix(p + 8, p) + n + 2 * p + 64;
}
constexpr int64_t kept_matrix(int64_t n, int64_t p) { return padded_matrix(n, p) + 16; }

// What the first pass leaves of a component's state to the second.
constexpr uint8_t left_out = 1, in_wider_type = 2;

// What the first pass over a chunk of a group leaves for the second.
struct Partial {
  double square;      // sum of ||xi||^2
  int64_t nonfinite;  // components left as they are
};

// Sums of one long vector, kept between the passes of a shared group.
struct VectorState {
  double qq, qm, square;  // <q,q>, <q,m>, ||xi||^2 on the unit sphere
  bool skipped, wide;
};

// Threads that share a matrix: run calls f(context, piece) for every piece < size, and waits for all.
struct Team {
  int size;
  void (*run)(int size, void (*f)(const void* context, int piece), const void* context);
};

struct Collection;

struct Kernels {
  // Euclidean components [begin, end), or elements [begin, end) of a single dense one (in_pieces): the whole step, or
  // first the sum of squares of the direction, which writes no state, then the step with lr / tau. skipped: one byte
  // per component of the job, in and out (unused in pieces, null where nothing is left out).
  void (*elements_whole)(const Job&, int64_t begin, int64_t end, Partial*);
  void (*elements_first)(const Job&, int64_t begin, int64_t end, Partial*, uint8_t* skipped);
  void (*elements_second)(const Job&, int64_t begin, int64_t end, double step, const uint8_t* skipped);
  // Small matrices, components [begin, end). whole: components that wait for no group's norm. Otherwise first the
  // momentum and the sum of squares, then, with lr / tau, the retraction. skipped as above. group: both over a whole
  // shared group, where that can be done at once; if not, nothing is done and false returned.
  void (*lanes_whole)(const Job&, int64_t begin, int64_t end, Partial*);
  void (*lanes_first)(const Job&, int64_t begin, int64_t end, Partial*, uint8_t* skipped);
  void (*lanes_second)(const Job&, int64_t begin, int64_t end, double step, const uint8_t* skipped);
  bool (*lanes_group)(const Job&, Partial*);
  // Long vectors: the columns of oblique components, else whole components. Components [begin, end); `states` has one
  // entry a vector of the job; `scratch` has vector_scratch arrays of a vector's length in the arithmetic type, or
  // column_scratch where vectors are columns.
  void (*vectors_whole)(const Job&, int64_t begin, int64_t end, Partial*, VectorState* states, void* scratch);
  void (*vectors_first)(const Job&, int64_t begin, int64_t end, Partial*, VectorState* states, void* scratch);
  void (*vectors_second)(const Job&, int64_t begin, int64_t end, double step, const VectorState* states, void* scratch);
  // Stiefel matrices too large for a lane, QR. `states`: one byte a component of the job, 0, left_out or in_wider_type;
  // `kept`: kept_matrix() numbers of the arithmetic type a component, which hold xi between the passes.
  void (*matrices_whole)(const Job&, int64_t begin, int64_t end, Partial*, Team, void* scratch);
  void (*matrices_first)(const Job&, int64_t begin, int64_t end, Partial*, uint8_t* states, void* kept, Team,
                         void* scratch);
  void (*matrices_second)(const Job&, int64_t begin, int64_t end, double step, const uint8_t* states, const void* kept,
                          Team, void* scratch);
  // Collections of 3 x 3 kernels (collection.h). How many kernels a block has, and the place of one of them; momentum
  // and squares of a chunk; the weights of blocks [begin, end).
  int collection_lanes;
  int64_t (*collection_place)(int64_t kernel);
  void (*collection_first)(const Collection&, int64_t chunk);
  void (*collection_second)(const Collection&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace mk
