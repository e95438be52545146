//! Weights to amounts: exact payments above a threshold, equal lots drawn among the rest.
//!
//! `sharechain/hasher/twin.py` holds the same algorithm with the reasoning behind it; the tests compare the two.
#![forbid(unsafe_code)]

use crate::buckets::order_by_bucket;
use crate::sha256::{Engine, sha256, tagged_hash};
use crate::weights::{Payee, WeightTable};
use std::cmp::Ordering;

/// What a draw is held to. All amounts are satoshis below 2^63; all but `value` are at least 1.
pub struct Terms {
    /// What there is to pay.
    pub value: u64,
    /// The most outputs that there may be.
    pub payout_class: u64,
    /// The least entitlement that is paid exactly.
    pub min_payout: u64,
    /// The least sum of small entitlements for which a lot is drawn.
    pub dust: u64,
}

/// The outputs of a draw.
#[derive(Default)]
pub struct Draw {
    /// Bitcoin TxOuts, one after the other: amount, script length, script.
    pub outputs: Vec<u8>,
    pub count: usize,
    pub paid: u64,
    pub threshold: u64,
}

/// Draws the payouts. `None` if the table is empty.
pub fn draw(table: &WeightTable, terms: &Terms, seed: &[u8]) -> Option<Draw> {
    let payees = table.payees();
    if payees.is_empty() {
        return None;
    }
    let entitled = Share::new(terms.value, table.total()).entitlements(payees);
    let threshold = threshold(&entitled, terms);

    let mut paid: Vec<Output> = Vec::with_capacity(payees.len().min(terms.payout_class as usize));
    let mut small = Small {
        amounts: Vec::with_capacity(payees.len()),
        scripts: Vec::with_capacity(payees.len()),
    };
    for (payee, &amount) in payees.iter().zip(&entitled) {
        if amount >= threshold {
            paid.push(Output::new(amount, &payee.script));
        } else if amount > 0 {
            small.amounts.push(amount);
            small.scripts.push(&payee.script);
        }
    }
    small.draw_lots(threshold, terms.dust, seed, &mut paid);
    paid.sort_unstable_by(Output::compare);
    Some(serialise(&paid, threshold))
}

/// An amount and the script that it is paid to.
struct Output<'a> {
    amount: u64,
    /// The first eight bytes of the script as a number, which decide nearly all comparisons.
    head: u64,
    script: &'a [u8],
}

impl<'a> Output<'a> {
    fn new(amount: u64, script: &'a [u8]) -> Output<'a> {
        let head = script
            .iter()
            .chain([0; 8].iter())
            .take(8)
            .fold(0, |head, &byte| head << 8 | byte as u64);
        Output {
            amount,
            head,
            script,
        }
    }

    /// The largest amount first, equal amounts by script. A shorter script comes before its continuations, and so
    /// does its head, filled up with zeros, or the heads are equal.
    fn compare(&self, other: &Output) -> Ordering {
        let amounts = other.amount.cmp(&self.amount);
        amounts
            .then(self.head.cmp(&other.head))
            .then_with(|| self.script.cmp(other.script))
    }
}

/// `weight * value / total`, rounded down, for many weights: a division each would cost more than all else here
/// but the hashing.
struct Share {
    value: u64,
    total: u128,
    /// The number of bits of `total`.
    shift: u32,
    /// floor(value * 2^shift / total), which is below 2^64 because `2^shift <= 2 * total`.
    reciprocal: u64,
}

impl Share {
    fn new(value: u64, total: u128) -> Share {
        let shift = u128::BITS - total.leading_zeros();
        // Long division of value * 2^shift, a bit at a time. `remainder < total`, so twice it may need 129 bits.
        let (mut quotient, mut remainder) = (0u64, 0u128);
        for position in (0..u64::BITS + shift).rev() {
            let bit = if position >= shift {
                (value >> (position - shift)) & 1
            } else {
                0
            };
            let carried = remainder >> 127 == 1;
            remainder = (remainder << 1) | bit as u128;
            quotient <<= 1;
            if carried || remainder >= total {
                remainder = remainder.wrapping_sub(total);
                quotient |= 1;
            }
        }
        Share {
            value,
            total,
            shift,
            reciprocal: quotient,
        }
    }

    fn entitlements(&self, payees: &[Payee]) -> Vec<u64> {
        payees.iter().map(|payee| self.of(payee.weight)).collect()
    }

    /// The reciprocal falls short of its true value by less than 1, so the estimate falls short by less than
    /// `weight / 2^shift < 1`: it is right or one too small, which the remainder tells.
    #[inline]
    fn of(&self, weight: u128) -> u64 {
        if self.shift < 64 {
            // The remainder is below 2 * total < 2^64, so the lower halves of the products tell it.
            let weight = weight as u64;
            let estimate = ((weight as u128 * self.reciprocal as u128) >> self.shift) as u64;
            let taken = estimate.wrapping_mul(self.total as u64);
            let remainder = weight.wrapping_mul(self.value).wrapping_sub(taken);
            return estimate + (remainder >= self.total as u64) as u64;
        }
        let (high, low) = multiply(weight, self.reciprocal);
        let estimate = if self.shift == 128 {
            high
        } else {
            ((high as u128) << (128 - self.shift) | low >> self.shift) as u64
        };
        let (product_high, product) = multiply(weight, self.value);
        let (taken_high, taken) = multiply(self.total, estimate);
        let (remainder, borrow) = product.overflowing_sub(taken);
        let remainder_high = product_high - taken_high - borrow as u64;
        estimate + (remainder_high > 0 || remainder >= self.total) as u64
    }
}

/// The 192-bit product as (top 64 bits, lower 128 bits).
#[inline]
fn multiply(a: u128, b: u64) -> (u64, u128) {
    let low = (a as u64) as u128 * b as u128;
    let high = (a >> 64) * b as u128 + (low >> 64);
    ((high >> 64) as u64, high << 64 | (low as u64) as u128)
}

/// The number of lots drawn when the entitlements below `threshold` sum to `sum`.
fn lots(sum: u64, threshold: u64, dust: u64) -> u64 {
    if sum < dust {
        0
    } else {
        (sum / threshold).max(1)
    }
}

/// The smallest threshold from `min_payout` on at which the payments and lots fit the payout class.
///
/// Between two neighbouring entitlements the sum of the small ones is constant and the number of lots falls as the
/// threshold rises, so each such stretch has a closed form for its first fitting threshold; the stretches are tried
/// upwards.
fn threshold(entitled: &[u64], terms: &Terms) -> u64 {
    let largest = entitled.len().min(terms.payout_class as usize);
    let mut top = entitled.to_vec();
    if largest < top.len() {
        top.select_nth_unstable_by(largest, |a, b| b.cmp(a));
        top.truncate(largest + 1);
    }
    top.sort_unstable_by(|a, b| b.cmp(a));
    let mut rest = entitled.iter().sum::<u64>() - top[..largest].iter().sum::<u64>();

    // `exact` entitlements are at or above the threshold, `rest` is the sum of the others.
    for exact in (0..=largest).rev() {
        let mut least = terms
            .min_payout
            .max(top.get(exact).map_or(0, |next| next + 1));
        let room = terms.payout_class - exact as u64;
        let fits = rest < terms.dust || room >= 1;
        if rest >= terms.dust && fits {
            least = least.max(rest / (room + 1) + 1);
        }
        if exact == 0 {
            return least;
        }
        if fits && least <= top[exact - 1] {
            return least;
        }
        rest += top[exact - 1];
    }
    unreachable!("a threshold above all entitlements needs at most one output");
}

/// The entitlements below the threshold but for those of 0, and their scripts.
struct Small<'a> {
    amounts: Vec<u64>,
    scripts: Vec<&'a [u8]>,
}

impl<'a> Small<'a> {
    /// Draws lots and adds the winners to `paid`.
    ///
    /// In a random order each entitlement covers a stretch of a line of length `sum`; the line is repeated `lots`
    /// times as fine, and points at distance `sum` from a random offset pick the winners.
    fn draw_lots(&self, threshold: u64, dust: u64, seed: &[u8], paid: &mut Vec<Output<'a>>) {
        let sum: u64 = self.amounts.iter().sum();
        let lots = lots(sum, threshold, dust);
        if lots == 0 {
            return;
        }
        let lot = sum / lots;
        let mut point = part_of(sum, &tagged_hash("p2pool/offset", seed)) as u128;
        let mut reached = 0u128;
        for i in self.drawing_order(seed) {
            reached += lots as u128 * self.amounts[i as usize] as u128;
            if point < reached {
                paid.push(Output::new(lot, self.scripts[i as usize]));
                point += sum as u128;
                debug_assert!(point >= reached, "an entitlement was drawn twice");
            }
        }
    }

    /// The positions in ascending order of SHA-256(seed || script).
    ///
    /// The hashes are spread evenly, so a bucket for each value of their first bits sorts them nearly; an insertion
    /// sort does the rest. The first 64 bits of two hashes are hardly ever equal.
    fn drawing_order(&self, seed: &[u8]) -> Vec<u32> {
        let mut keys = vec![0u64; self.scripts.len()];
        Engine::current().digest_all(seed, &self.scripts, |i, digest| {
            keys[i] = (digest[0] as u64) << 32 | digest[1] as u64;
        });
        let bits = keys.len().ilog2() + 1;
        let mut order = order_by_bucket(keys.len(), 1 << bits, |i| {
            (keys[i] >> (u64::BITS - bits)) as usize
        });
        let digest = |i: u32| sha256(&[seed, self.scripts[i as usize]].concat());
        let is_after = |i: u32, j: u32| match keys[i as usize].cmp(&keys[j as usize]) {
            Ordering::Equal => digest(i) > digest(j),
            unequal => unequal.is_gt(),
        };
        for end in 1..order.len() {
            let moved = order[end];
            let mut place = end;
            while place > 0 && is_after(order[place - 1], moved) {
                order[place] = order[place - 1];
                place -= 1;
            }
            order[place] = moved;
        }
        order
    }
}

/// `range` scaled by a big-endian 256-bit fraction: floor(range * fraction / 2^256), below `range`.
fn part_of(range: u64, fraction: &[u8; 32]) -> u64 {
    let (words, _) = fraction.as_chunks::<8>();
    words.iter().rev().fold(0, |carry, word| {
        ((range as u128 * u64::from_be_bytes(*word) as u128 + carry as u128) >> 64) as u64
    })
}

fn serialise(paid: &[Output], threshold: u64) -> Draw {
    let mut draw = Draw {
        outputs: Vec::with_capacity(paid.len() * 43),
        count: paid.len(),
        paid: 0,
        threshold,
    };
    for &Output { amount, script, .. } in paid {
        draw.paid += amount;
        draw.outputs.extend(amount.to_le_bytes());
        match script.len() {
            len @ 0..=0xfc => draw.outputs.push(len as u8),
            len @ 0xfd..=0xffff => {
                draw.outputs.push(0xfd);
                draw.outputs.extend((len as u16).to_le_bytes());
            }
            len => {
                draw.outputs.push(0xfe);
                draw.outputs.extend((len as u32).to_le_bytes());
            }
        }
        draw.outputs.extend(script);
    }
    draw
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            self.0 ^ self.0 >> 29
        }
    }

    /// floor(a * b / c) by schoolbook shift and subtract on 192 bits.
    fn slow(a: u128, b: u64, c: u128) -> u64 {
        let (high, low) = multiply(a, b);
        let (mut quotient, mut rest) = (0u64, 0u128);
        for bit in (0..192).rev() {
            let next = if bit >= 128 {
                (high >> (bit - 128)) as u128 & 1
            } else {
                low >> bit & 1
            };
            let carried = rest >> 127 == 1;
            rest = rest << 1 | next;
            quotient <<= 1;
            if carried || rest >= c {
                rest = rest.wrapping_sub(c);
                quotient |= 1;
            }
        }
        quotient
    }

    #[test]
    fn test_entitlement_is_exact() {
        let mut random = Random(3);
        for _ in 0..20_000 {
            let total = (((random.next() as u128) << 64 | random.next() as u128)
                >> (random.next() % 128))
                .max(1);
            let weight = match random.next() % 4 {
                0 => total,
                1 => total - 1,
                2 => total / 2,
                _ => ((random.next() as u128) << 64 | random.next() as u128) % total,
            };
            let value = random.next() >> 1 >> (random.next() % 63);
            let share = Share::new(value, total);
            assert_eq!(
                share.of(weight),
                slow(weight, value, total),
                "{weight} * {value} / {total}"
            );
        }
        for total in [1, u64::MAX as u128, 1 << 64, 1 << 127, u128::MAX] {
            assert_eq!(Share::new((1 << 63) - 1, total).of(total), (1 << 63) - 1);
        }
    }

    #[test]
    fn test_threshold_is_the_smallest_that_fits() {
        let mut random = Random(9);
        for _ in 0..20_000 {
            let n = random.next() % 9 + 1;
            let limit = [2, 10, 60][(random.next() % 3) as usize];
            let entitled: Vec<u64> = (0..n).map(|_| random.next() % limit).collect();
            let terms = Terms {
                value: 0,
                payout_class: random.next() % 6 + 1,
                min_payout: random.next() % 20 + 1,
                dust: random.next() % 30 + 1,
            };
            let fits = |t: u64| {
                let exact = entitled.iter().filter(|&&e| e >= t).count() as u64;
                let rest: u64 = entitled.iter().filter(|&&e| e < t).sum();
                exact + lots(rest, t, terms.dust) <= terms.payout_class
            };
            let slow = (terms.min_payout..).find(|&t| fits(t)).unwrap();
            assert_eq!(
                threshold(&entitled, &terms),
                slow,
                "{entitled:?}, class {}",
                terms.payout_class
            );
        }
    }

    #[test]
    fn test_an_empty_table_has_no_draw() {
        let terms = Terms {
            value: 1,
            payout_class: 1,
            min_payout: 1,
            dust: 1,
        };
        assert!(draw(&WeightTable::default(), &terms, b"").is_none());
    }
}
