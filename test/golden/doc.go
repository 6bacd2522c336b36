// Package golden keeps pools as releases have left them, devices and region, and opens
// them: what a release has written, later ones go on reading.
//
// A pool is one file of testdata, KIND-N.golden, with N counting the sets that were kept: a
// gzip stream of the blocks that are not zero. It was released with its log in the region,
// as a partner finds it, with metadata in trees, in the journal and in the log, and with
// a part of the log flushed. KIND-N.json says what its volumes hold, in the region and
// without it, by their SHA-256.
//
// Sets are never made anew. When a format has got another version, or something new is
// kept, a further set is made of all kinds
//
//	go test ./test/golden -run TestMake -make 2
//
// and added to the repository.
package golden
