//! The weight of each script in the PPLNS window, kept up to date share by share.
#![forbid(unsafe_code)]

use hashbrown::HashTable;
use std::hash::{BuildHasher, RandomState};

/// A script and its weight, which is never zero.
#[derive(Clone)]
pub struct Payee {
    pub script: Box<[u8]>,
    pub weight: u128,
}

/// Why a weight could not be added.
#[derive(Debug, PartialEq, Eq)]
pub enum AddError {
    /// The script's weight would fall below zero; the weight it has.
    Negative(u128),
    /// The total would reach 2^128.
    Overflow,
}

/// Weights by script.
///
/// Mutable fields: `payees` in no particular order, `index` and `total`. Invariant: `index` holds each position of
/// `payees` exactly once, under the hash of its script; no two scripts are equal; no weight is zero; `total` is the
/// sum of the weights and below 2^128. The hash is keyed, for miners choose their scripts.
#[derive(Clone, Default)]
pub struct WeightTable {
    index: HashTable<u32>,
    payees: Vec<Payee>,
    total: u128,
    keys: RandomState,
}

impl WeightTable {
    /// Adds (or, `subtract`, takes away) weight. Nothing changes on an error.
    pub fn add(&mut self, script: &[u8], magnitude: u128, subtract: bool) -> Result<(), AddError> {
        if magnitude == 0 {
            return Ok(());
        }
        let hash = self.keys.hash_one(script);
        let found = self
            .index
            .find(hash, |&i| *self.payees[i as usize].script == *script)
            .copied();
        if subtract {
            let Some(i) = found else {
                return Err(AddError::Negative(0));
            };
            let payee = &mut self.payees[i as usize];
            payee.weight = payee
                .weight
                .checked_sub(magnitude)
                .ok_or(AddError::Negative(payee.weight))?;
            self.total -= magnitude;
            if payee.weight == 0 {
                self.remove(hash, i);
            }
            return Ok(());
        }
        self.total = self
            .total
            .checked_add(magnitude)
            .ok_or(AddError::Overflow)?;
        if let Some(i) = found {
            self.payees[i as usize].weight += magnitude;
        } else {
            let (payees, keys) = (&mut self.payees, &self.keys);
            payees.push(Payee {
                script: script.into(),
                weight: magnitude,
            });
            let rehash = |&i: &u32| keys.hash_one(&*payees[i as usize].script);
            self.index
                .insert_unique(hash, (payees.len() - 1) as u32, rehash);
        }
        Ok(())
    }

    /// Removes position `i`, whose script has this hash; the last payee takes its place.
    fn remove(&mut self, hash: u64, i: u32) {
        if let Ok(entry) = self.index.find_entry(hash, |&j| j == i) {
            entry.remove();
        }
        self.payees.swap_remove(i as usize);
        if let Some(moved) = self.payees.get(i as usize) {
            let last = self.payees.len() as u32;
            if let Some(position) = self
                .index
                .find_mut(self.keys.hash_one(&*moved.script), |&j| j == last)
            {
                *position = i;
            }
        }
    }

    /// The script's weight, 0 when it has none.
    pub fn weight(&self, script: &[u8]) -> u128 {
        let hash = self.keys.hash_one(script);
        let found = self
            .index
            .find(hash, |&i| *self.payees[i as usize].script == *script);
        found.map_or(0, |&i| self.payees[i as usize].weight)
    }

    pub fn total(&self) -> u128 {
        self.total
    }

    /// All payees, in no particular order.
    pub fn payees(&self) -> &[Payee] {
        &self.payees
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn test_table_equals_a_plain_map() {
        let mut table = WeightTable::default();
        let mut plain: BTreeMap<Vec<u8>, u128> = BTreeMap::new();
        let mut random = 1u64;
        for _ in 0..20_000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let script = vec![(random >> 33) as u8 % 40; 22];
            let magnitude = (random >> 45) as u128 % 4;
            let subtract = random >> 63 == 1;
            let weight = plain.entry(script.clone()).or_default();
            if subtract && *weight < magnitude {
                assert_eq!(
                    table.add(&script, magnitude, true),
                    Err(AddError::Negative(*weight))
                );
            } else {
                *weight = if subtract {
                    *weight - magnitude
                } else {
                    *weight + magnitude
                };
                assert_eq!(table.add(&script, magnitude, subtract), Ok(()));
            }
            assert_eq!(table.weight(&script), plain[&script]);
            plain.retain(|_, weight| *weight != 0);
            assert_eq!(table.payees().len(), plain.len());
            assert_eq!(table.total(), plain.values().sum::<u128>());
        }
        assert!(
            plain
                .iter()
                .all(|(script, weight)| table.weight(script) == *weight)
        );
    }

    #[test]
    fn test_overflow_changes_nothing() {
        let mut table = WeightTable::default();
        assert_eq!(table.add(b"a", u128::MAX, false), Ok(()));
        assert_eq!(table.add(b"b", 1, false), Err(AddError::Overflow));
        assert_eq!(
            (table.total(), table.weight(b"a"), table.payees().len()),
            (u128::MAX, u128::MAX, 1)
        );
    }
}
