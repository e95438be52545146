//! The nonce scan on vectors of 32-bit words, one nonce to a lane: the rounds, once, as straight-line code.
//!
//! A vector type brings nine functions (`ops`); [`scan_lanes`] makes the scan of them. What is the same for all nonces
//! is added up beforehand, by [`Job`](super::Job) for one header and here for all headers:
//!
//! - Only the nonce differs within a job, word 3 of the second block. Rounds 0 to 2 do not see it and round 3 only adds
//!   it to two numbers, so the job has the state after round 3 for a nonce of 0.
//! - Words 4 to 15 of that block are padding: they are never added, they are part of the round constants. The same
//!   holds for words 8 to 15 of the second hash's block, and in words 16 to 33 of both schedules what is constant is one
//!   number or none.
//! - The second hash begins with the initial value, the same for all: round 0 adds its word to two constants.
//! - The hash ends in `h`, which is what `e` was three rounds before. So the rounds end at the `e` of round 60, and what
//!   only the others need is not written down.
//!
//! The rounds of the second hash are numbered 64 to 127, so that `CONSTANTS` is one table.
//!
//! A nonce of which the masked word is zero is only a candidate: the caller hashes it again, in full.

/// Round `$i` with the roles of the working variables passed instead of moved. `$kw` is constant plus word.
macro_rules! round {
    ($ops:ident, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $kw:expr) => {
        let first = $ops::add(
            $ops::add($ops::add($h, $kw), $ops::choose($e, $f, $g)),
            $ops::big_sigma1($e),
        );
        $d = $ops::add($d, first);
        $h = $ops::add(
            $ops::add(first, $ops::majority($a, $b, $c)),
            $ops::big_sigma0($a),
        );
    };
}

/// The half of a round that makes the next `e`.
macro_rules! round_of_e {
    ($ops:ident, $d:ident $e:ident $f:ident $g:ident $h:ident, $kw:expr) => {
        $d = $ops::add(
            $ops::add($ops::add($ops::add($h, $kw), $d), $ops::choose($e, $f, $g)),
            $ops::big_sigma1($e),
        );
    };
}

/// Eight rounds: `$kw!(i)` is constant plus word of round i, for i from `$i` on.
macro_rules! eight_rounds {
    ($ops:ident, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $kw:ident, $k:ident, $w:ident, $i:expr) => {
        round!($ops, $a $b $c $d $e $f $g $h, $kw!($ops, $k, $w, $i));
        round!($ops, $h $a $b $c $d $e $f $g, $kw!($ops, $k, $w, $i + 1));
        round!($ops, $g $h $a $b $c $d $e $f, $kw!($ops, $k, $w, $i + 2));
        round!($ops, $f $g $h $a $b $c $d $e, $kw!($ops, $k, $w, $i + 3));
        round!($ops, $e $f $g $h $a $b $c $d, $kw!($ops, $k, $w, $i + 4));
        round!($ops, $d $e $f $g $h $a $b $c, $kw!($ops, $k, $w, $i + 5));
        round!($ops, $c $d $e $f $g $h $a $b, $kw!($ops, $k, $w, $i + 6));
        round!($ops, $b $c $d $e $f $g $h $a, $kw!($ops, $k, $w, $i + 7));
    };
}

/// The word of round `$i` from the sixteen before it, in place of the first of them; then constant plus word.
macro_rules! extended {
    ($ops:ident, $k:ident, $w:ident, $i:expr) => {{
        $w[$i & 15] = $ops::add(
            $ops::add($w[$i & 15], $ops::small_sigma0($w[($i + 1) & 15])),
            $ops::add($w[($i + 9) & 15], $ops::small_sigma1($w[($i + 14) & 15])),
        );
        $ops::add($w[$i & 15], $ops::constant(&$k[$i]))
    }};
}

/// The word of round `$i`, which is there already, plus the constant.
macro_rules! given {
    ($ops:ident, $k:ident, $w:ident, $i:expr) => {
        $ops::add($w[$i & 15], $ops::constant(&$k[$i]))
    };
}

/// Defines `scan`: the first of `batches` batches of `LANES` nonces from `first` on in which the masked last word of a
/// hash is zero, and the lanes in which it is, lane 0 in the least significant bit. `first` is a multiple of `LANES`.
#[cfg(target_arch = "x86_64")]
macro_rules! scan_lanes {
    ($ops:ident $(, $attribute:meta)?) => {
        $(#[$attribute])?
        pub fn scan(job: &Job, first: u32, batches: u32) -> Option<(u32, u32)> {
            for batch in 0..batches {
                // Opaque to the compiler, which would else write each constant's own address, four bytes long, into its
                // instruction. The code is so long that reading it is what limits the speed.
                let k = std::hint::black_box(&$ops::CONSTANTS);
                // The lane is in the last byte of the nonce, so in the first of its word.
                let nonce = first.wrapping_add(batch * $ops::LANES as u32).swap_bytes();
                let hits = $ops::zeros_of_last_word(last_word(job, k, $ops::add_lane($ops::splat(nonce))), job.mask);
                if hits != 0 {
                    return Some((batch, hits));
                }
            }
            None
        }

        last_word!($ops, inline $(, $attribute)?);
    };
}

/// Defines `last_word`, of the hash of the job's header with the given nonces, read as SHA-256 does.
macro_rules! last_word {
    ($ops:ident, $inline:meta $(, $attribute:meta)?) => {
        #[$inline]
        $(#[$attribute])?
        #[allow(unused_assignments)] // What the last rounds leave in words and variables that nobody needs.
        fn last_word(job: &Job, k: &[$ops::Constant; 128], nonce: $ops::Vector) -> $ops::Vector {
            use $ops::{add, constant, small_sigma0, small_sigma1, splat};

            // The first hash, from round 4 on.
            let [e, f, g, h, a, b, c, d] = job.after_round_3;
            let mut e = add(splat(e), nonce);
            let mut f = splat(f);
            let mut g = splat(g);
            let mut h = splat(h);
            let mut a = add(splat(a), nonce);
            let mut b = splat(b);
            let mut c = splat(c);
            let mut d = splat(d);
            round!($ops, e f g h a b c d, constant(&k[4]));
            round!($ops, d e f g h a b c, constant(&k[5]));
            round!($ops, c d e f g h a b, constant(&k[6]));
            round!($ops, b c d e f g h a, constant(&k[7]));
            round!($ops, a b c d e f g h, constant(&k[8]));
            round!($ops, h a b c d e f g, constant(&k[9]));
            round!($ops, g h a b c d e f, constant(&k[10]));
            round!($ops, f g h a b c d e, constant(&k[11]));
            round!($ops, e f g h a b c d, constant(&k[12]));
            round!($ops, d e f g h a b c, constant(&k[13]));
            round!($ops, c d e f g h a b, constant(&k[14]));
            round!($ops, b c d e f g h a, constant(&k[15]));
            round!($ops, a b c d e f g h, splat(K[16].wrapping_add(job.w16)));
            round!($ops, h a b c d e f g, splat(K[17].wrapping_add(job.w17)));

            let mut w = [splat(0); 16];
            w[0] = splat(job.w16);
            w[1] = splat(job.w17);
            w[2] = add(splat(job.w18), small_sigma0(nonce));
            w[3] = add(splat(job.w19), nonce);
            w[4] = add(small_sigma1(w[2]), splat(PADDING));
            w[5] = small_sigma1(w[3]);
            w[6] = add(small_sigma1(w[4]), splat(HEADER_BITS));
            w[7] = add(small_sigma1(w[5]), splat(job.w16));
            w[8] = add(small_sigma1(w[6]), splat(job.w17));
            w[9] = add(small_sigma1(w[7]), w[2]);
            w[10] = add(small_sigma1(w[8]), w[3]);
            w[11] = add(small_sigma1(w[9]), w[4]);
            w[12] = add(small_sigma1(w[10]), w[5]);
            w[13] = add(small_sigma1(w[11]), w[6]);
            w[14] = add(add(small_sigma1(w[12]), w[7]), splat(scalar::small_sigma0(HEADER_BITS)));
            w[15] = add(add(small_sigma1(w[13]), w[8]), splat(job.w31));
            round!($ops, g h a b c d e f, given!($ops, k, w, 18));
            round!($ops, f g h a b c d e, given!($ops, k, w, 19));
            round!($ops, e f g h a b c d, given!($ops, k, w, 20));
            round!($ops, d e f g h a b c, given!($ops, k, w, 21));
            round!($ops, c d e f g h a b, given!($ops, k, w, 22));
            round!($ops, b c d e f g h a, given!($ops, k, w, 23));
            eight_rounds!($ops, a b c d e f g h, given, k, w, 24);
            w[0] = add(add(small_sigma1(w[14]), w[9]), splat(job.w32));
            round!($ops, a b c d e f g h, given!($ops, k, w, 32));
            w[1] = add(add(small_sigma1(w[15]), w[10]), add(small_sigma0(w[2]), splat(job.w17)));
            round!($ops, h a b c d e f g, given!($ops, k, w, 33));
            round!($ops, g h a b c d e f, extended!($ops, k, w, 34));
            round!($ops, f g h a b c d e, extended!($ops, k, w, 35));
            round!($ops, e f g h a b c d, extended!($ops, k, w, 36));
            round!($ops, d e f g h a b c, extended!($ops, k, w, 37));
            round!($ops, c d e f g h a b, extended!($ops, k, w, 38));
            round!($ops, b c d e f g h a, extended!($ops, k, w, 39));
            eight_rounds!($ops, a b c d e f g h, extended, k, w, 40);
            eight_rounds!($ops, a b c d e f g h, extended, k, w, 48);
            eight_rounds!($ops, a b c d e f g h, extended, k, w, 56);

            // The second hash, of the first.
            w[0] = add(a, splat(job.midstate[0]));
            w[1] = add(b, splat(job.midstate[1]));
            w[2] = add(c, splat(job.midstate[2]));
            w[3] = add(d, splat(job.midstate[3]));
            w[4] = add(e, splat(job.midstate[4]));
            w[5] = add(f, splat(job.midstate[5]));
            w[6] = add(g, splat(job.midstate[6]));
            w[7] = add(h, splat(job.midstate[7]));
            a = splat(INITIAL[0]);
            b = splat(INITIAL[1]);
            c = splat(INITIAL[2]);
            d = add(w[0], splat(E_AFTER_ROUND_0));
            e = splat(INITIAL[4]);
            f = splat(INITIAL[5]);
            g = splat(INITIAL[6]);
            h = add(w[0], splat(A_AFTER_ROUND_0));
            // The constants of rounds 65 to 67 have the `h` of these rounds in them.
            g = splat(0);
            round!($ops, h a b c d e f g, given!($ops, k, w, 65));
            f = splat(0);
            round!($ops, g h a b c d e f, given!($ops, k, w, 66));
            e = splat(0);
            round!($ops, f g h a b c d e, given!($ops, k, w, 67));
            round!($ops, e f g h a b c d, given!($ops, k, w, 68));
            round!($ops, d e f g h a b c, given!($ops, k, w, 69));
            round!($ops, c d e f g h a b, given!($ops, k, w, 70));
            round!($ops, b c d e f g h a, given!($ops, k, w, 71));
            round!($ops, a b c d e f g h, constant(&k[72]));
            round!($ops, h a b c d e f g, constant(&k[73]));
            round!($ops, g h a b c d e f, constant(&k[74]));
            round!($ops, f g h a b c d e, constant(&k[75]));
            round!($ops, e f g h a b c d, constant(&k[76]));
            round!($ops, d e f g h a b c, constant(&k[77]));
            round!($ops, c d e f g h a b, constant(&k[78]));
            round!($ops, b c d e f g h a, constant(&k[79]));
            w[0] = add(w[0], small_sigma0(w[1]));
            round!($ops, a b c d e f g h, given!($ops, k, w, 80));
            w[1] = add(add(w[1], small_sigma0(w[2])), splat(scalar::small_sigma1(HASH_BITS)));
            round!($ops, h a b c d e f g, given!($ops, k, w, 81));
            w[2] = add(add(w[2], small_sigma0(w[3])), small_sigma1(w[0]));
            round!($ops, g h a b c d e f, given!($ops, k, w, 82));
            w[3] = add(add(w[3], small_sigma0(w[4])), small_sigma1(w[1]));
            round!($ops, f g h a b c d e, given!($ops, k, w, 83));
            w[4] = add(add(w[4], small_sigma0(w[5])), small_sigma1(w[2]));
            round!($ops, e f g h a b c d, given!($ops, k, w, 84));
            w[5] = add(add(w[5], small_sigma0(w[6])), small_sigma1(w[3]));
            round!($ops, d e f g h a b c, given!($ops, k, w, 85));
            w[6] = add(add(w[6], small_sigma0(w[7])), add(small_sigma1(w[4]), splat(HASH_BITS)));
            round!($ops, c d e f g h a b, given!($ops, k, w, 86));
            w[7] = add(add(w[7], splat(scalar::small_sigma0(PADDING))), add(small_sigma1(w[5]), w[0]));
            round!($ops, b c d e f g h a, given!($ops, k, w, 87));
            w[8] = add(add(small_sigma1(w[6]), splat(PADDING)), w[1]);
            round!($ops, a b c d e f g h, given!($ops, k, w, 88));
            w[9] = add(small_sigma1(w[7]), w[2]);
            round!($ops, h a b c d e f g, given!($ops, k, w, 89));
            w[10] = add(small_sigma1(w[8]), w[3]);
            round!($ops, g h a b c d e f, given!($ops, k, w, 90));
            w[11] = add(small_sigma1(w[9]), w[4]);
            round!($ops, f g h a b c d e, given!($ops, k, w, 91));
            w[12] = add(small_sigma1(w[10]), w[5]);
            round!($ops, e f g h a b c d, given!($ops, k, w, 92));
            w[13] = add(small_sigma1(w[11]), w[6]);
            round!($ops, d e f g h a b c, given!($ops, k, w, 93));
            w[14] = add(add(small_sigma1(w[12]), w[7]), splat(scalar::small_sigma0(HASH_BITS)));
            round!($ops, c d e f g h a b, given!($ops, k, w, 94));
            w[15] = add(
                add(small_sigma1(w[13]), splat(HASH_BITS)),
                add(w[8], small_sigma0(w[0])),
            );
            round!($ops, b c d e f g h a, given!($ops, k, w, 95));
            eight_rounds!($ops, a b c d e f g h, extended, k, w, 96);
            eight_rounds!($ops, a b c d e f g h, extended, k, w, 104);
            eight_rounds!($ops, a b c d e f g h, extended, k, w, 112);
            round!($ops, a b c d e f g h, extended!($ops, k, w, 120));
            round_of_e!($ops, c d e f g, extended!($ops, k, w, 121));
            round_of_e!($ops, b c d e f, extended!($ops, k, w, 122));
            round_of_e!($ops, a b c d e, extended!($ops, k, w, 123));
            round_of_e!($ops, h a b c d, extended!($ops, k, w, 124));
            add(h, splat(INITIAL[7]))
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) use scan_lanes;
pub(super) use {eight_rounds, extended, given, last_word, round, round_of_e};
