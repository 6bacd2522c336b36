// Package blockmap maps the logical blocks of volumes to physical ones.
//
// # Theory
//
// The map of a volume is a copy-on-write radix tree of 4 KiB pages ([Tree]).
// An entry, of a leaf as of an inner page, is a [block.Pointer]: address, birth
// and checksum of what it points at. A page is therefore verified by its
// parent, up to the root, which the superblock holds. The pool's reference
// counts and its catalogue are stored in trees of the same shape, so that one
// mechanism proves all metadata and a lost or misdirected write of any of it is
// noticed. (The design asked for count pages at fixed places with two slots;
// there a lost write would leave the older slot valid, and its counts, too
// low, would hand out blocks that are in use. A tree cannot make that mistake
// and needs no initialisation of a new device.)
//
// Rewriting a leaf at each consistency point would cost a page for each random
// block. Committed changes are therefore journalled and kept in memory, in an
// [Overlay] above the tree, and folded into the tree now and then:
//
//	look-up:  active overlay  →  folding overlay  →  tree
//
// Each of the three holds references of its own: a block that the tree still
// points at keeps its count although an overlay entry hides it, until a fold
// has replaced the entry in the tree and the superblock of that fold is
// durable. So a consistency point needs no reads at all, and a count is exactly
// the number of entries in trees and overlays that point at the block.
//
// # Concurrency
//
// Map.mu guards the overlays' and roots' identity and contents. It is held for
// look-ups in memory and short insertions, never during I/O. Pages never change
// in place: a reader that loses a race with a fold may find a page's block
// reused, which its checksum shows; it then starts again from the new root.
package blockmap
