// Runs oneDNN primitives on request and times them. One command a line on standard input, one answer a line:
//
//   matmul TYPES DST POST_OPS M N K
//   conv   TYPES DST POST_OPS G MB IC IH IW OC OH OW KH KW SH SW DH DW TOP LEFT BOTTOM RIGHT
//       -> ok JOB IMPLEMENTATION     TYPES: u8s8 s8s8 f32 bf16; POST_OPS: "-" or relu,clip:0:6,sum:0.5,...
//   run JOB CALLS -> ok NANOSECONDS NANOSECONDS_OF_THIS_THREADS_PROCESSOR_TIME
//   drop JOB      -> ok
//
// A command that oneDNN refuses is answered by "error MESSAGE". All layouts are "any", that is oneDNN's choice;
// reorders into them happen before anything is timed. Dilations count holes (0 is dense), as oneDNN does.
// The first line written is "ready VERSION ISA", ISA being the number of the effective dnnl_cpu_isa_t.

#include <cstdint>
#include <cstring>
#include <ctime>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"

using namespace dnnl;
using dt = memory::data_type;
using tag = memory::format_tag;
using dims = memory::dims;

static engine cpu(engine::kind::cpu, 0);
static stream queue(cpu);

struct Job {
    primitive prim;
    std::unordered_map<int, memory> args;
    std::string impl;
};

struct Types {
    dt src, wei, dst, bias;
    bool quantized;
};

static dt type_named(const std::string &name) {
    static const std::map<std::string, dt> known = {
            {"u8", dt::u8}, {"s8", dt::s8}, {"s32", dt::s32}, {"f32", dt::f32}, {"bf16", dt::bf16}};
    return known.at(name);
}

static Types types_named(const std::string &name, const std::string &dst) {
    if (name == "u8s8" || name == "s8s8")
        return {type_named(name.substr(0, 2)), dt::s8, type_named(dst), dt::f32, true};
    const dt both = type_named(name);
    return {both, both, type_named(dst), dt::f32, false};
}

static std::vector<std::string> split(const std::string &text, char at) {
    std::vector<std::string> parts;
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, at);) parts.push_back(part);
    return parts;
}

static post_ops parse_post_ops(const std::string &text) {
    post_ops ops;
    if (text == "-") return ops;
    for (const auto &one : split(text, ',')) {
        const auto words = split(one, ':');
        const auto number = [&](size_t i, float otherwise) {
            return i < words.size() ? std::stof(words[i]) : otherwise;
        };
        if (words[0] == "relu") ops.append_eltwise(algorithm::eltwise_relu, 0, 0);
        else if (words[0] == "leaky") ops.append_eltwise(algorithm::eltwise_relu, number(1, 0.01f), 0);
        else if (words[0] == "clip") ops.append_eltwise(algorithm::eltwise_clip, number(1, 0), number(2, 0));
        else if (words[0] == "linear") ops.append_eltwise(algorithm::eltwise_linear, number(1, 1), number(2, 0));
        else if (words[0] == "gelu") ops.append_eltwise(algorithm::eltwise_gelu_erf, 0, 0);
        else if (words[0] == "hardswish") ops.append_eltwise(algorithm::eltwise_hardswish, 1.f / 6, 0.5f);
        else if (words[0] == "sigmoid") ops.append_eltwise(algorithm::eltwise_logistic, 0, 0);
        else if (words[0] == "tanh") ops.append_eltwise(algorithm::eltwise_tanh, 0, 0);
        else if (words[0] == "silu") ops.append_eltwise(algorithm::eltwise_swish, number(1, 1), 0);
        else if (words[0] == "sum") ops.append_sum(number(1, 1));
        else throw std::runtime_error("unknown post-op " + one);
    }
    return ops;
}

// Small random values: full range for bytes, [-1, 1) for floats.
static void fill(memory &m) {
    static uint64_t state = 88172645463325252u;
    auto next = [] {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state;
    };
    const auto type = m.get_desc().get_data_type();
    const size_t bytes = m.get_desc().get_size();
    char *p = static_cast<char *>(m.get_data_handle());
    for (size_t i = 0; i < bytes; ++i) {
        if (type == dt::u8 || type == dt::s8) p[i] = static_cast<char>(next() >> 24);
        else if (i % 4 == 0) {
            const float v = static_cast<float>(static_cast<int64_t>(next())) / 9.3e18f;
            std::memcpy(p + i, &v, 4);
        }
    }
}

// A memory of the wanted layout, filled by a reorder from random data in the plain layout.
static memory filled(const memory::desc &want, const dims &shape, dt type, tag plain) {
    const dt raw = type == dt::bf16 ? dt::f32 : type;
    memory user({shape, raw, plain}, cpu), packed(want, cpu);
    fill(user);
    reorder(user, packed).execute(queue, user, packed);
    queue.wait();
    return packed;
}

static memory constant(int64_t count, float value) {
    memory m({{count}, dt::f32, tag::x}, cpu);
    for (int64_t i = 0; i < count; ++i) static_cast<float *>(m.get_data_handle())[i] = value;
    return m;
}

static primitive_attr attributes(const Types &t, const std::string &ops, int weight_mask) {
    primitive_attr attr;
    attr.set_post_ops(parse_post_ops(ops));
    if (t.quantized) {
        attr.set_scales_mask(DNNL_ARG_SRC, 0);
        attr.set_scales_mask(DNNL_ARG_WEIGHTS, weight_mask);
        if (t.dst == dt::u8 || t.dst == dt::s8) attr.set_scales_mask(DNNL_ARG_DST, 0);
    }
    return attr;
}

static void add_scales(Job &job, const Types &t, int64_t channels) {
    if (!t.quantized) return;
    job.args[DNNL_ARG_ATTR_SCALES | DNNL_ARG_SRC] = constant(1, 0.02f);
    job.args[DNNL_ARG_ATTR_SCALES | DNNL_ARG_WEIGHTS] = constant(channels, 0.005f);
    if (t.dst == dt::u8 || t.dst == dt::s8) job.args[DNNL_ARG_ATTR_SCALES | DNNL_ARG_DST] = constant(1, 0.5f);
}

static Job make_matmul(const Types &t, const std::string &ops, int64_t m, int64_t n, int64_t k) {
    const memory::desc src({m, k}, t.src, tag::any), wei({k, n}, t.wei, tag::any);
    const memory::desc bias({1, n}, t.bias, tag::ab), dst({m, n}, t.dst, tag::ab);
    const matmul::primitive_desc pd(cpu, src, wei, bias, dst, attributes(t, ops, 1 << 1));
    Job job {matmul(pd), {}, pd.impl_info_str()};
    memory out(pd.dst_desc(), cpu);
    std::memset(out.get_data_handle(), 0, pd.dst_desc().get_size());
    job.args = {{DNNL_ARG_SRC, filled(pd.src_desc(), {m, k}, t.src, tag::ab)},
            {DNNL_ARG_WEIGHTS, filled(pd.weights_desc(), {k, n}, t.wei, tag::ab)},
            {DNNL_ARG_BIAS, filled(bias, {1, n}, t.bias, tag::ab)}, {DNNL_ARG_DST, out}};
    add_scales(job, t, n);
    return job;
}

static Job make_conv(const Types &t, const std::string &ops, const std::vector<int64_t> &v) {
    const int64_t g = v[0], mb = v[1], ic = v[2], oc = v[5];
    const bool grouped = g > 1;
    const dims src_shape {mb, ic, v[3], v[4]}, dst_shape {mb, oc, v[6], v[7]};
    const dims wei_shape = grouped ? dims {g, oc / g, ic / g, v[8], v[9]} : dims {oc, ic, v[8], v[9]};
    const memory::desc src(src_shape, t.src, tag::any), wei(wei_shape, t.wei, tag::any);
    const memory::desc bias({oc}, t.bias, tag::x), dst(dst_shape, t.dst, tag::any);
    const convolution_forward::primitive_desc pd(cpu, prop_kind::forward_inference, algorithm::convolution_direct,
            src, wei, bias, dst, {v[10], v[11]}, {v[12], v[13]}, {v[14], v[15]}, {v[16], v[17]},
            attributes(t, ops, grouped ? 3 : 1));
    Job job {convolution_forward(pd), {}, pd.impl_info_str()};
    memory out(pd.dst_desc(), cpu);
    std::memset(out.get_data_handle(), 0, pd.dst_desc().get_size());
    job.args = {{DNNL_ARG_SRC, filled(pd.src_desc(), src_shape, t.src, tag::nchw)},
            {DNNL_ARG_WEIGHTS, filled(pd.weights_desc(), wei_shape, t.wei, grouped ? tag::goihw : tag::oihw)},
            {DNNL_ARG_BIAS, filled(bias, {oc}, t.bias, tag::x)}, {DNNL_ARG_DST, out}};
    add_scales(job, t, oc);
    return job;
}

static int64_t nanoseconds(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * int64_t(1000000000) + t.tv_nsec;
}

static std::string time_calls(const Job &job, int64_t calls) {
    const int64_t start = nanoseconds(CLOCK_MONOTONIC), cpu = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    for (int64_t i = 0; i < calls; ++i) job.prim.execute(queue, job.args);
    queue.wait();
    const int64_t cpu_took = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
    return std::to_string(nanoseconds(CLOCK_MONOTONIC) - start) + " " + std::to_string(cpu_took);
}

static std::string answer(const std::string &line, std::map<int, Job> &jobs) {
    static int number = 0;
    std::istringstream in(line);
    std::string verb;
    in >> verb;
    if (verb == "run" || verb == "drop") {
        int which;
        int64_t calls = 0;
        in >> which >> calls;
        if (verb == "run") return "ok " + time_calls(jobs.at(which), calls);
        jobs.erase(which);
        return "ok";
    }
    std::string types, dst, ops;
    in >> types >> dst >> ops;
    std::vector<int64_t> values;
    for (int64_t v; in >> v;) values.push_back(v);
    const Types t = types_named(types, dst);
    if (verb == "matmul" && values.size() == 3)
        jobs[++number] = make_matmul(t, ops, values[0], values[1], values[2]);
    else if (verb == "conv" && values.size() == 18) jobs[++number] = make_conv(t, ops, values);
    else throw std::runtime_error("not a command: " + line);
    return "ok " + std::to_string(number) + " " + jobs[number].impl;
}

int main() {
    const auto *v = version();
    std::cout << "ready " << v->major << '.' << v->minor << '.' << v->patch << ' '
              << static_cast<int>(get_effective_cpu_isa()) << std::endl;
    std::map<int, Job> jobs;
    for (std::string line; std::getline(std::cin, line);) {
        try {
            std::cout << answer(line, jobs) << std::endl;
        } catch (const std::exception &e) {
            std::cout << "error " << e.what() << std::endl;
        }
    }
}
