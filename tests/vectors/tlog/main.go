// Makes tests/vectors/tlog.json with the implementations of others: golang.org/x/mod/sumdb (tlog, note) and
// github.com/transparency-dev (merkle, formats). Run `go run . > ../tlog.json` here to make it again; the output never changes,
// because keys and times are fixed.
package main

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"

	"github.com/transparency-dev/formats/log"
	tnote "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/formats/proof"
	merkleproof "github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type inclusion struct {
	Size, Index int64
	Proof       []tlog.Hash
}

type consistency struct {
	Old, Size int64
	Proof     []tlog.Hash
}

type tile struct {
	Path string
	Size int64
	SHA  []byte
}

type signed struct {
	Key, Note string
}

type answer struct {
	Leaves       string
	Roots        []tlog.Hash
	Inclusions   []inclusion
	Consistent   []consistency
	Tiles        []tile
	Notes        []signed
	Cosigned     signed
	CosignedTime int64
	TlogProof    string
	TlogLeaf     []byte
	TlogKey      string
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

func main() {
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var found []tlog.Hash
		for _, index := range indexes {
			found = append(found, stored[index])
		}
		return found, nil
	})
	out := answer{Leaves: "leaf N, in decimal, for N from 0"}
	const size = 600
	for n := int64(0); n < size; n++ {
		stored = append(stored, must(tlog.StoredHashes(n, fmt.Appendf(nil, "leaf %d", n), reader))...)
	}
	for n := int64(0); n <= size; n++ {
		out.Roots = append(out.Roots, must(tlog.TreeHash(n, reader)))
	}
	for _, n := range []int64{1, 2, 3, 7, 8, 70, 255, 256, 257, 511, 513, 600} {
		root := out.Roots[n]
		for _, index := range []int64{0, 1, 2, 6, 7, 69, 254, 255, 256, 512, 599} {
			if index >= n {
				continue
			}
			path := must(tlog.ProveRecord(n, index, reader))
			out.Inclusions = append(out.Inclusions, inclusion{n, index, path})
			leaf := rfc6962.DefaultHasher.HashLeaf(fmt.Appendf(nil, "leaf %d", index))
			check(merkleproof.VerifyInclusion(rfc6962.DefaultHasher, uint64(index), uint64(n), leaf, raw(path), root[:]))
		}
		for _, old := range []int64{1, 2, 3, 6, 8, 64, 69, 128, 255, 256, 257, 512, 599, 600} {
			if old > n {
				continue
			}
			path := must(tlog.ProveTree(n, old, reader))
			out.Consistent = append(out.Consistent, consistency{old, n, path})
			before := out.Roots[old]
			check(merkleproof.VerifyConsistency(rfc6962.DefaultHasher, uint64(old), uint64(n), raw(tlog.RecordProof(path)), before[:], root[:]))
		}
	}
	for _, each := range tlog.NewTiles(8, 0, size) {
		data := must(tlog.ReadTileData(each, reader))
		sum := sha256.Sum256(data)
		out.Tiles = append(out.Tiles, tile{each.Path(), size, sum[:]})
	}
	for _, index := range []int64{0, 999, 1000, 1234067, 1000000000} {
		out.Tiles = append(out.Tiles, tile{tlog.Tile{H: 8, L: 3, N: index, W: 256}.Path(), -index, nil})
	}

	seed := sha256.Sum256([]byte("keybroker test vectors"))
	private := ed25519.NewKeyFromSeed(seed[:])
	vkey := must(note.NewEd25519VerifierKey("example.org/vectors", private.Public().(ed25519.PublicKey)))
	skey := fmt.Sprintf("PRIVATE+KEY+%s+%s", vkey[:len("example.org/vectors")+9], base64.StdEncoding.EncodeToString(append([]byte{1}, seed[:]...)))
	signer := must(note.NewSigner(skey))
	for _, n := range []int64{0, 1, 256, 600} {
		root := out.Roots[n]
		text := log.Checkpoint{Origin: "example.org/vectors", Size: uint64(n), Hash: root[:]}.Marshal()
		message := must(note.Sign(&note.Note{Text: string(text)}, signer))
		out.Notes = append(out.Notes, signed{vkey, string(message)})
	}
	last := []byte(out.Notes[len(out.Notes)-1].Note)
	record := fmt.Appendf(nil, "leaf %d", 69)
	out.TlogLeaf, out.TlogKey = record, vkey
	path := must(tlog.ProveRecord(size, 69, reader))
	var hashes [][sha256.Size]byte
	for _, each := range path {
		hashes = append(hashes, each)
	}
	out.TlogProof = string(proof.TLogProof{Index: 69, Hashes: hashes, Checkpoint: last, ExtraData: []byte("hello")}.Marshal())

	// A cosignature at a fixed time, put together by hand, and opened by transparency-dev's verifier.
	witnessSeed := sha256.Sum256([]byte("keybroker test witness"))
	witness := ed25519.NewKeyFromSeed(witnessSeed[:])
	witnessKey := must(note.NewEd25519VerifierKey("witness.example/w1", witness.Public().(ed25519.PublicKey)))
	verifier := must(tnote.NewVerifierForCosignatureV1(witnessKey))
	opened := must(note.Open(last, note.VerifierList(must(note.NewVerifier(vkey)))))
	out.CosignedTime = 1679315147
	body := ed25519.Sign(witness, []byte(fmt.Sprintf("cosignature/v1\ntime %d\n%s", out.CosignedTime, opened.Text)))
	data := binary.BigEndian.AppendUint32(nil, verifier.KeyHash())
	data = append(binary.BigEndian.AppendUint64(data, uint64(out.CosignedTime)), body...)
	line := fmt.Sprintf("— %s %s\n", verifier.Name(), base64.StdEncoding.EncodeToString(data))
	must(note.Open([]byte(string(last)+line), note.VerifierList(verifier)))
	public := append([]byte{4}, witness.Public().(ed25519.PublicKey)...)
	out.Cosigned = signed{fmt.Sprintf("%s+%08x+%s", verifier.Name(), verifier.KeyHash(), base64.StdEncoding.EncodeToString(public)), string(last) + line}

	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", " ")
	check(encoder.Encode(out))
}

func raw(path tlog.RecordProof) [][]byte {
	var found [][]byte
	for _, each := range path {
		found = append(found, append([]byte(nil), each[:]...))
	}
	return found
}
