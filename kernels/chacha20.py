"""ChaCha20 (RFC 8439) and Box-Muller for one block of the generator a lane: `csrc/chacha20.h` line by line.

Words are those of every other backend. So are normals where nothing is contracted to fused multiply-adds: launch with
:data:`EXACT`.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXACT = dict(enable_fp_fusion=False)
CHECKED = tl.constexpr(False)  # words wrap: an overflow is none


@triton.jit
def quarter_round(a, b, c, d):
    a = tl.add(a, b, sanitize_overflow=CHECKED)
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = tl.add(c, d, sanitize_overflow=CHECKED)
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = tl.add(a, b, sanitize_overflow=CHECKED)
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = tl.add(c, d, sanitize_overflow=CHECKED)
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def wrapping_add(x, y):
    return tl.add(x, y, sanitize_overflow=CHECKED)


@triton.jit
def chacha20(key, first, step, index, counter):
    """The 16 words of the blocks whose numbers stand in ``counter``, under the nonce (first, step, index)."""
    zero = counter ^ counter
    key = key.to(tl.pointer_type(tl.uint32))
    k0, k1, k2, k3 = tl.load(key), tl.load(key + 1), tl.load(key + 2), tl.load(key + 3)
    k4, k5, k6, k7 = tl.load(key + 4), tl.load(key + 5), tl.load(key + 6), tl.load(key + 7)
    a0, a1, a2, a3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    b0, b1, b2, b3 = zero + k0, zero + k1, zero + k2, zero + k3
    c0, c1, c2, c3 = zero + k4, zero + k5, zero + k6, zero + k7
    d0, d1, d2, d3 = counter, zero + first, zero + step, zero + index
    for _ in range(10):
        a0, b0, c0, d0 = quarter_round(a0, b0, c0, d0)
        a1, b1, c1, d1 = quarter_round(a1, b1, c1, d1)
        a2, b2, c2, d2 = quarter_round(a2, b2, c2, d2)
        a3, b3, c3, d3 = quarter_round(a3, b3, c3, d3)
        a0, b1, c2, d3 = quarter_round(a0, b1, c2, d3)
        a1, b2, c3, d0 = quarter_round(a1, b2, c3, d0)
        a2, b3, c0, d1 = quarter_round(a2, b3, c0, d1)
        a3, b0, c1, d2 = quarter_round(a3, b0, c1, d2)
    a0, a1 = wrapping_add(a0, 0x61707865), wrapping_add(a1, 0x3320646E)
    a2, a3 = wrapping_add(a2, 0x79622D32), wrapping_add(a3, 0x6B206574)
    b0, b1, b2, b3 = wrapping_add(b0, k0), wrapping_add(b1, k1), wrapping_add(b2, k2), wrapping_add(b3, k3)
    c0, c1, c2, c3 = wrapping_add(c0, k4), wrapping_add(c1, k5), wrapping_add(c2, k6), wrapping_add(c3, k7)
    d0, d1 = wrapping_add(d0, counter), wrapping_add(d1, first)
    d2, d3 = wrapping_add(d2, step), wrapping_add(d3, index)
    return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def log_of_parts(f, e):
    """ln(1 + f) + e ln 2 for 1 + f in [sqrt(1/2), sqrt(2))."""
    p = f * -7.634774674570084e-2 + 1.276170313358307e-1
    p = p * f - 1.3160136342048645e-1
    p = p * f + 1.4201734960079193e-1
    p = p * f - 1.662335991859436e-1
    p = p * f + 2.0001228153705597e-1
    p = p * f - 2.500081956386566e-1
    p = p * f + 3.333333134651184e-1
    square = f * f
    small = p * f * square - square * 0.5 + e * -2.12194440e-4
    return f + small + e * 0.693359375


@triton.jit
def split(x):
    """(m, e) with x = m 2^e and m in [sqrt(1/2), sqrt(2)), for x > 0."""
    offset = bits_of(x) - 0x3F3504F3
    e = (offset >> 23).to(tl.float32)
    return ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True), e


@triton.jit
def radius(a):
    """``sqrt(-2 ln u)`` for u = (a + 1/2) / 2^32; near 1 the logarithm is taken of 1 - u, which is exact."""
    upper = a >= 0x80000000
    below = bits_of(tl.where(upper, a ^ 0xFFFFFFFF, a)).to(tl.float32)
    y = (below + 0.5) * 2.3283064365386963e-10  # min(u, 1 - u)
    m, e = split(tl.where(upper, 1.0 - y, y))
    f = tl.where(upper, tl.where(e == 0.0, -y, 1.0 - (y + y)), m - 1.0)
    return tl.sqrt_rn(log_of_parts(f, e) * -2.0)


@triton.jit
def with_tail(r, a, tail):
    """``r``, but for a < 2^16 the radius of u = (2^32 a + tail + 1/2) / 2^64."""
    word = (a.to(tl.uint64) << 32) | tail.to(tl.uint64)
    m, e = split((word.to(tl.float32) + 0.5) * 5.421010862427522e-20)
    return tl.where(a < 0x10000, tl.sqrt_rn(log_of_parts(m - 1.0, e) * -2.0), r)


@triton.jit
def times_direction(r, b):
    """``r`` times the cosine and the sine of 2 pi b / 2^32: the nearest quarter turn is cut off in integers."""
    quarter = wrapping_add(b, 0x20000000) >> 30
    t = bits_of(b << 2).to(tl.float32) * 2.3283064365386963e-10  # what remains, in quarter turns
    s = t * t
    q = (s * -4.6048532240092754e-3 + 7.968141883611679e-2) * s - 6.459636092185974e-1
    sine = t * 1.5707963705062866 + t * (s * q - 4.371139e-8)
    p = (s * 9.03770443983376e-4 - 2.086016722023487e-2) * s + 2.5366923213005066e-1
    cosine = (p * s - 1.2337005138397217) * s + 1.0
    odd = (quarter & 1) != 0
    first = bits_of(tl.where(odd, sine, cosine)) ^ bits_of(((quarter + 1) >> 1) << 31)
    second = bits_of(tl.where(odd, cosine, sine)) ^ bits_of((quarter >> 1) << 31)
    return first.to(tl.float32, bitcast=True) * r, second.to(tl.float32, bitcast=True) * r


@triton.jit
def normals(key, first, step, index, counter):
    """Standard normals of the 16 words of every block. The second word of a pair's radius is drawn where the first is
    below 2^16 in some lane: once in 64 programs of 128 lanes."""
    x = chacha20(key, first, step, index, counter)
    r0, r2, r4, r6 = radius(x[0]), radius(x[2]), radius(x[4]), radius(x[6])
    r8, r10, r12, r14 = radius(x[8]), radius(x[10]), radius(x[12]), radius(x[14])
    lowest = tl.minimum(tl.minimum(tl.minimum(x[0], x[2]), tl.minimum(x[4], x[6])), tl.minimum(x[8], x[10]))
    lowest = tl.minimum(lowest, tl.minimum(x[12], x[14]))
    if tl.min(lowest, 0) < 0x10000:
        t = chacha20(key, first + 1, step, index, counter)  # the domain of tail words is the next one
        r0, r2, r4 = with_tail(r0, x[0], t[0]), with_tail(r2, x[2], t[2]), with_tail(r4, x[4], t[4])
        r6, r8, r10 = with_tail(r6, x[6], t[6]), with_tail(r8, x[8], t[8]), with_tail(r10, x[10], t[10])
        r12, r14 = with_tail(r12, x[12], t[12]), with_tail(r14, x[14], t[14])
    z0, z1 = times_direction(r0, x[1])
    z2, z3 = times_direction(r2, x[3])
    z4, z5 = times_direction(r4, x[5])
    z6, z7 = times_direction(r6, x[7])
    z8, z9 = times_direction(r8, x[9])
    z10, z11 = times_direction(r10, x[11])
    z12, z13 = times_direction(r12, x[13])
    z14, z15 = times_direction(r14, x[15])
    return z0, z1, z2, z3, z4, z5, z6, z7, z8, z9, z10, z11, z12, z13, z14, z15
