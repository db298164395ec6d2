#include "nn/recurrence.hpp"

#include <algorithm>
#include <vector>

#include "linalg/sum.hpp"
#include "linalg/threads.hpp"

namespace bitwright {
namespace {

constexpr Index chunk_tokens = 64;

template <typename Scalar>
struct Inputs {
    ConstMatrixView<Scalar> query, key, value, decay, strength;
    RecurrenceRule rule;
    bool corrects;

    Index width() const { return key.cols() / rule.key_heads; }
    Index value_width() const { return value.cols() / rule.heads; }
    Index shared() const { return rule.heads / rule.key_heads; }
    Index chunks() const { return (rule.length + chunk_tokens - 1) / chunk_tokens; }
};

// What a chunk of one sample and head is computed from, in memory of its own, and its solution.
template <typename Scalar>
struct Chunk {
    Index start, rows;
    Matrix<Scalar> query, key, value;
    AlignedRow<Scalar> strength, grown,
        left;                 // grown: exp of the decay up to a token, left: after it
    Matrix<Scalar> decays;    // [rows, rows]: from a token to a later one, zero above the diagonal
    Matrix<Scalar> likeness;  // key · key, decayed, below the diagonal
    Matrix<Scalar> scores;    // query · key, decayed
    Matrix<Scalar> recalled;  // grown · (key · state)
    Matrix<Scalar> system, updates;
    Scalar total;

    Chunk(const Inputs<Scalar>& from, Index sample, Index head, Index index,
          const Matrix<Scalar>& state)
        : start(sample * from.rule.length + index * chunk_tokens),
          rows(std::min(chunk_tokens, from.rule.length - index * chunk_tokens)) {
        const Index width = from.width(), key_head = head / from.shared();
        query = from.query.block(start, key_head * width, rows, width);
        key = from.key.block(start, key_head * width, rows, width);
        value = from.value.block(start, head * from.value_width(), rows, from.value_width());
        strength.resize(rows);
        AlignedRow<Scalar> sums(rows);
        Scalar so_far = 0;
        for (Index i = 0; i < rows; ++i) {
            strength[i] = from.strength(start + i, head);
            sums[i] = so_far += from.decay(start + i, head);
        }
        grown = sums.exp();
        total = grown[rows - 1];
        left = (so_far - sums).exp();
        decays.setZero(rows, rows);
        AlignedRow<Scalar> row(rows);
        for (Index i = 0; i < rows; ++i) {
            row = (sums[i] - sums).min(Scalar(0)).exp();
            decays.row(i).head(i + 1) = row.head(i + 1).matrix();
        }
        scores.noalias() = query * key.transpose();
        scores.array() *= decays.array();
        updates = value;
        if (from.corrects) {
            likeness.noalias() = key * key.transpose();
            likeness.array() *= decays.array();
            for (Index i = 0; i < rows; ++i) likeness.row(i).tail(rows - i).setZero();
            recalled.noalias() = key * state;
            recalled.array().colwise() *= grown.transpose();
            updates -= recalled;
        }
        updates.array().colwise() *= strength.transpose();
        if (from.corrects) {
            system = likeness;
            system.array().colwise() *= strength.transpose();
            for (Index i = 1; i < rows; ++i)
                updates.row(i).noalias() -= system.row(i).head(i) * updates.topRows(i);
        }
    }

    void pass(Matrix<Scalar>& state) const {
        const Matrix<Scalar> kept = left.transpose().matrix().asDiagonal() * key;
        state *= total;
        state.noalias() += kept.transpose() * updates;
    }

    Matrix<Scalar> output(const Matrix<Scalar>& state) const {
        Matrix<Scalar> result(rows, state.cols());
        result.noalias() = query * state;
        result.array().colwise() *= grown.transpose();
        result.noalias() += scores * updates;
        return result;
    }
};

// The gradients of one chunk, added to those of its inputs; `to_state` turns from the gradient of
// the state after the chunk into that before it.
template <typename Scalar>
void chunk_backward(const Chunk<Scalar>& chunk, bool corrects, const Matrix<Scalar>& state,
                    const Matrix<Scalar>& above, Matrix<Scalar>& to_state, Matrix<Scalar>& to_query,
                    Matrix<Scalar>& to_key, Matrix<Scalar>& to_value, AlignedRow<Scalar>& to_decay,
                    AlignedRow<Scalar>& to_strength) {
    const Index rows = chunk.rows;
    const auto& key = chunk.key;
    AlignedRow<Scalar> to_sums = AlignedRow<Scalar>::Zero(rows);
    const Matrix<Scalar> kept = chunk.left.transpose().matrix().asDiagonal() * key;
    const Matrix<Scalar> faded = chunk.grown.transpose().matrix().asDiagonal() * above;
    Matrix<Scalar> to_updates = chunk.scores.transpose() * above;
    to_updates.noalias() += kept * to_state;
    const Matrix<Scalar> from_state = chunk.updates * to_state.transpose();  // of the kept keys
    Scalar to_last = chunk.total * sum((state.array() * to_state.array()));
    for (Index i = 0; i < rows; ++i) {
        const Scalar moved = sum(from_state.row(i).array() * kept.row(i).array());
        to_last += moved;
        to_sums[i] -= moved;
    }
    to_sums[rows - 1] += to_last;
    to_key += chunk.left.transpose().matrix().asDiagonal() * from_state;

    Matrix<Scalar> to_scores = above * chunk.updates.transpose();
    Matrix<Scalar> slopes = to_scores.array() * chunk.scores.array();
    to_scores.array() *= chunk.decays.array();
    to_query.noalias() = to_scores * key;
    to_key.noalias() += to_scores.transpose() * chunk.query;
    const Matrix<Scalar> read = faded * state.transpose();
    for (Index i = 0; i < rows; ++i)
        to_sums[i] += sum(read.row(i).array() * chunk.query.row(i).array());
    to_query += read;
    to_state *= chunk.total;
    to_state.noalias() += chunk.query.transpose() * faded;

    // Backwards through the triangular system: rows from the last on.
    if (corrects)
        for (Index i = rows - 1; i > 0; --i)
            to_updates.topRows(i).noalias() -=
                chunk.system.row(i).head(i).transpose() * to_updates.row(i);
    Matrix<Scalar> wanted = chunk.value;
    if (corrects) wanted -= chunk.recalled;
    for (Index i = 0; i < rows; ++i)
        to_strength[i] = sum(to_updates.row(i).array() * wanted.row(i).array());
    to_value = chunk.strength.transpose().matrix().asDiagonal() * to_updates;
    if (corrects) {
        Matrix<Scalar> to_recalled = -to_value;
        for (Index i = 0; i < rows; ++i)
            to_sums[i] += sum(to_recalled.row(i).array() * chunk.recalled.row(i).array());
        to_recalled.array().colwise() *= chunk.grown.transpose();
        to_key.noalias() += to_recalled * state.transpose();
        to_state.noalias() += key.transpose() * to_recalled;
        Matrix<Scalar> to_system = -(to_updates * chunk.updates.transpose());
        for (Index i = 0; i < rows; ++i) {
            to_system.row(i).tail(rows - i).setZero();
            to_strength[i] += sum(to_system.row(i).array() * chunk.likeness.row(i).array());
        }
        slopes.array() += to_system.array() * chunk.system.array();
        to_system.array().colwise() *= chunk.strength.transpose();
        to_system.array() *= chunk.decays.array();
        to_key.noalias() += to_system * key;
        to_key.noalias() += to_system.transpose() * key;
    }
    for (Index i = 0; i < rows; ++i) {
        to_sums[i] += sum(slopes.row(i));
        for (Index j = 0; j <= i; ++j) to_sums[j] -= slopes(i, j);
    }
    Scalar after = 0;
    for (Index i = rows - 1; i >= 0; --i) to_decay[i] = after += to_sums[i];
}

}  // namespace

template <typename Scalar>
void recurrence(ConstMatrixView<Scalar> query, ConstMatrixView<Scalar> key,
                ConstMatrixView<Scalar> value, ConstMatrixView<Scalar> decay,
                ConstMatrixView<Scalar> strength, const RecurrenceRule& rule, bool corrects,
                Scalar* states, MatrixView<Scalar> output) {
    const Inputs<Scalar> from{query, key, value, decay, strength, rule, corrects};
    const Index width = from.width(), value_width = from.value_width();
    parallel_for(query.rows() / rule.length * rule.heads, 1, [&](Index first, Index last) {
        Matrix<Scalar> state(width, value_width);
        for (Index item = first; item < last; ++item) {
            const Index head = item % rule.heads, sample = item / rule.heads;
            MatrixView<Scalar> kept(states ? states + item * state.size() : nullptr, width,
                                    value_width);
            if (states)
                state = kept;
            else
                state.setZero();
            for (Index index = 0; index < from.chunks(); ++index) {
                const Chunk<Scalar> chunk(from, sample, head, index, state);
                output.block(chunk.start, head * value_width, chunk.rows, value_width) =
                    chunk.output(state);
                chunk.pass(state);
            }
            if (states) kept = state;
        }
    });
}

template <typename Scalar>
void recurrence_backward(ConstMatrixView<Scalar> query, ConstMatrixView<Scalar> key,
                         ConstMatrixView<Scalar> value, ConstMatrixView<Scalar> decay,
                         ConstMatrixView<Scalar> strength, const RecurrenceRule& rule,
                         bool corrects, ConstMatrixView<Scalar> gradient,
                         RecurrenceGradients<Scalar> gradients) {
    const Inputs<Scalar> from{query, key, value, decay, strength, rule, corrects};
    const Index width = from.width(), value_width = from.value_width(), shared = from.shared();
    // One item per key head, so that the heads that share it add to its gradients in their order.
    parallel_for(query.rows() / rule.length * rule.key_heads, 1, [&](Index first, Index last) {
        std::vector<Matrix<Scalar>> states(from.chunks());
        for (Index item = first; item < last; ++item) {
            const Index key_head = item % rule.key_heads, sample = item / rule.key_heads;
            for (Index head = key_head * shared; head < (key_head + 1) * shared; ++head) {
                Matrix<Scalar> state = Matrix<Scalar>::Zero(width, value_width);
                for (Index index = 0; index < from.chunks(); ++index) {
                    states[index] = state;
                    Chunk<Scalar>(from, sample, head, index, state).pass(state);
                }
                Matrix<Scalar> to_state = Matrix<Scalar>::Zero(width, value_width);
                for (Index index = from.chunks() - 1; index >= 0; --index) {
                    const Chunk<Scalar> chunk(from, sample, head, index, states[index]);
                    const Index rows = chunk.rows, start = chunk.start;
                    const Matrix<Scalar> above =
                        gradient.block(start, head * value_width, rows, value_width);
                    Matrix<Scalar> to_query(rows, width), to_value(rows, value_width);
                    Matrix<Scalar> to_key = Matrix<Scalar>::Zero(rows, width);
                    AlignedRow<Scalar> to_decay(rows), to_strength(rows);
                    chunk_backward(chunk, corrects, states[index], above, to_state, to_query,
                                   to_key, to_value, to_decay, to_strength);
                    gradients.value.block(start, head * value_width, rows, value_width) = to_value;
                    gradients.decay.col(head).segment(start, rows) = to_decay.matrix().transpose();
                    gradients.strength.col(head).segment(start, rows) =
                        to_strength.matrix().transpose();
                    auto query_part = gradients.query.block(start, key_head * width, rows, width);
                    auto key_part = gradients.key.block(start, key_head * width, rows, width);
                    if (head % shared == 0) {
                        query_part = to_query;
                        key_part = to_key;
                    } else {
                        query_part += to_query;
                        key_part += to_key;
                    }
                }
            }
        }
    });
}

template <typename Scalar>
void convolve(ConstMatrixView<Scalar> states, ConstMatrixView<Scalar> weight, const Scalar* bias,
              Index length, MatrixView<Scalar> output) {
    const Index channels = states.cols(), width = weight.cols();
    const Matrix<Scalar> taps = weight.transpose();
    AlignedRow<Scalar> start = AlignedRow<Scalar>::Zero(channels);
    if (bias) start = ConstVectorView<Scalar>(bias, channels).transpose().array();
    parallel_for(states.rows(), 16, [&](Index first, Index last) {
        AlignedRow<Scalar> sums(channels), values(channels);
        for (Index row = first; row < last; ++row) {
            sums = start;
            for (Index j = std::max<Index>(0, width - 1 - row % length); j < width; ++j) {
                values = states.row(row - width + 1 + j).array();
                sums += taps.row(j).array() * values;
            }
            output.row(row).array() = sums;
        }
    });
}

template <typename Scalar>
void convolve_backward(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> weight,
                       Index length, MatrixView<Scalar> states_gradient) {
    const Index channels = gradient.cols(), width = weight.cols();
    const Matrix<Scalar> taps = weight.transpose();
    parallel_for(gradient.rows(), 16, [&](Index first, Index last) {
        AlignedRow<Scalar> sums(channels), values(channels);
        for (Index row = first; row < last; ++row) {
            sums.setZero();
            const Index after = std::min(width, length - row % length);
            for (Index ahead = 0; ahead < after; ++ahead) {
                values = gradient.row(row + ahead).array();
                sums += taps.row(width - 1 - ahead).array() * values;
            }
            states_gradient.row(row).array() = sums;
        }
    });
}

#define BITWRIGHT_RECURRENCE(Scalar)                                                               \
    template void recurrence(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,                     \
                             ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,                     \
                             ConstMatrixView<Scalar>, const RecurrenceRule&, bool, Scalar*,        \
                             MatrixView<Scalar>);                                                  \
    template void recurrence_backward(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,            \
                                      ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,            \
                                      ConstMatrixView<Scalar>, const RecurrenceRule&, bool,        \
                                      ConstMatrixView<Scalar>, RecurrenceGradients<Scalar>);       \
    template void convolve(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>, const Scalar*, Index, \
                           MatrixView<Scalar>);                                                    \
    template void convolve_backward(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>, Index,       \
                                    MatrixView<Scalar>);
BITWRIGHT_RECURRENCE(float)
BITWRIGHT_RECURRENCE(double)

}  // namespace bitwright
