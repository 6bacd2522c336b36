package dedup

import "github.com/zeebo/xxh3"

// Fingerprint is a hash of a block's content under the secret of its pool: blocks
// that are equal have equal ones, and others hardly ever. None stands for a block
// of which none is known.
type Fingerprint uint64

// None is the fingerprint of no block.
const None Fingerprint = 0

// Secret makes the fingerprints of a pool unpredictable: else a client could choose
// blocks whose fingerprints agree, and make others pay for comparing them. XXH3 is
// no cipher, and need not be one.
type Secret uint64

// Fingerprint returns the fingerprint of a block.
func (s Secret) Fingerprint(data []byte) Fingerprint {
	return max(1, Fingerprint(xxh3.HashSeed(data, uint64(s))))
}
