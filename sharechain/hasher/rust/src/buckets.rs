//! Counting sort: positions in ascending order of a small number.
#![forbid(unsafe_code)]

/// The positions `0..len` in ascending order of `bucket_of`, which is below `buckets`; equal ones stay in order.
#[inline]
pub fn order_by_bucket(len: usize, buckets: usize, bucket_of: impl Fn(usize) -> usize) -> Vec<u32> {
    let mut next = vec![0u32; buckets];
    for i in 0..len {
        next[bucket_of(i)] += 1;
    }
    let mut start = 0;
    for count in &mut next {
        (*count, start) = (start, start + *count);
    }
    let mut order = vec![0; len];
    for i in 0..len {
        let place = &mut next[bucket_of(i)];
        order[*place as usize] = i as u32;
        *place += 1;
    }
    order
}

#[cfg(test)]
mod tests {
    use super::order_by_bucket;

    #[test]
    fn test_equals_a_stable_sort() {
        let numbers: Vec<usize> = (0..500usize).map(|i| i * i * 31 % 17).collect();
        let mut sorted: Vec<u32> = (0..500).collect();
        sorted.sort_by_key(|&i| numbers[i as usize]);
        assert_eq!(order_by_bucket(500, 17, |i| numbers[i]), sorted);
        assert!(order_by_bucket(0, 1, |_| 0).is_empty());
    }
}
