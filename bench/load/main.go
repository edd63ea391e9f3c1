// Command load asks a keybroker for signatures over mutual TLS 1.3, closed loop: each connection sends its next request when it has the
// answer to the one before. It is written to cost little, because it shares the host with what it measures: requests are bytes made
// beforehand, answers are read with the least that HTTP/1.1 asks for, and its own CPU time is part of the result.
//
// It reads one JSON object on standard input (type order). It prints `measuring` when the warm-up is over, `done` when the time is up, and then
// one line of JSON (type result). With `listen` in the order it is the other side: a responder that answers each request with the same
// bytes, to tell what the generator itself costs; it prints `measuring` when it listens and ends when its standard input ends.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// order says what to do. Durations are seconds; bytes are base64 in JSON.
type order struct {
	Address     string   `json:"address"`
	Listen      bool     `json:"listen"`
	SVID        string   `json:"svid"`   // PEM file, chain and key
	Bundle      string   `json:"bundle"` // PEM file, who to trust
	ServerName  string   `json:"server_name"`
	Connections int      `json:"connections"`
	WarmUp      float64  `json:"warm_up"`
	Seconds     float64  `json:"seconds"`
	Requests    [][]byte `json:"requests"`   // sent in turn, by all connections together
	Signatures  int      `json:"signatures"` // that a good answer has
	Answer      []byte   `json:"answer"`     // of the responder
}

// result is what came of it. A latency bucket i holds answers that took less than growth^i microseconds, and not less than growth^(i-1).
type result struct {
	Seconds   float64        `json:"seconds"`
	Answers   int            `json:"answers"`
	Faults    int            `json:"faults"` // answers that were not 200, or without all their signatures
	Fault     string         `json:"fault"`  // the first of them
	CPU       float64        `json:"cpu"`    // seconds of this process, user and system
	TotalUS   float64        `json:"total_us"`
	Latencies map[string]int `json:"latencies"`
}

const (
	growth  = 1.02
	buckets = 1024 // up to 1.02^1023 microseconds, ten minutes
)

const (
	warmingUp = iota
	measuring
	over
)

var (
	logGrowth = math.Log(growth)
	signature = []byte(`"signature":`)
)

// client is one connection and what it has seen.
type client struct {
	conn      *tls.Conn
	reader    *bufio.Reader
	body      []byte
	latencies [buckets]int
	answers   int
	faults    int
	fault     string
	total     time.Duration
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run() error {
	input := bufio.NewReader(os.Stdin)
	line, err := input.ReadBytes('\n')
	if err != nil {
		return err
	}
	var o order
	if err := json.Unmarshal(line, &o); err != nil {
		return err
	}
	runtime.GOMAXPROCS(1) // more threads would steal from each other what they save
	debug.SetGCPercent(800)
	settings, err := tlsSettings(o)
	if err != nil {
		return err
	}
	if o.Listen {
		return respond(o, settings, input)
	}
	r, err := generate(o, settings)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func tlsSettings(o order) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(o.SVID, o.SVID)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(o.Bundle)
	if err != nil {
		return nil, err
	}
	trusted := x509.NewCertPool()
	if !trusted.AppendCertsFromPEM(pem) {
		return nil, errors.New("no certificate in the bundle")
	}
	return &tls.Config{
		Certificates:           []tls.Certificate{pair},
		RootCAs:                trusted,
		ClientCAs:              trusted,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ServerName:             o.ServerName,
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
	}, nil
}

func generate(o order, settings *tls.Config) (*result, error) {
	clients := make([]*client, o.Connections)
	for i := range clients {
		conn, err := tls.Dial("tcp", o.Address, settings)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(time.Duration((o.WarmUp + o.Seconds + 60) * float64(time.Second))))
		clients[i] = &client{conn: conn, reader: bufio.NewReaderSize(conn, 64*1024), body: make([]byte, 64*1024)}
	}
	var phase, next atomic.Int32
	var all sync.WaitGroup
	failed := make(chan error, len(clients))
	for _, c := range clients {
		all.Add(1)
		go func(c *client) {
			defer all.Done()
			for phase.Load() != over {
				request := o.Requests[int(uint32(next.Add(1)))%len(o.Requests)]
				if err := c.ask(request, o.Signatures, &phase); err != nil {
					failed <- err
					return
				}
			}
		}(c)
	}
	time.Sleep(time.Duration(o.WarmUp * float64(time.Second)))
	fmt.Println("measuring")
	started, cpu := time.Now(), cpuTime()
	phase.Store(measuring)
	time.Sleep(time.Duration(o.Seconds * float64(time.Second)))
	phase.Store(over)
	r := &result{Seconds: time.Since(started).Seconds(), CPU: cpuTime() - cpu, Latencies: map[string]int{}}
	fmt.Println("done")
	all.Wait()
	select {
	case err := <-failed:
		return nil, err
	default:
	}
	for _, c := range clients {
		c.addTo(r)
	}
	return r, nil
}

// ask sends one request and reads its answer.
func (c *client) ask(request []byte, signatures int, phase *atomic.Int32) error {
	started := time.Now()
	if _, err := c.conn.Write(request); err != nil {
		return err
	}
	status, body, err := c.read()
	if err != nil {
		return err
	}
	took := time.Since(started)
	if phase.Load() != measuring {
		return nil
	}
	c.answers++
	c.total += took
	bucket := int(math.Log(math.Max(float64(took)/1e3, 1))/logGrowth) + 1
	if bucket >= buckets {
		bucket = buckets - 1
	}
	c.latencies[bucket]++
	if status != 200 || bytes.Count(body, signature) != signatures {
		c.faults++
		if c.fault == "" {
			c.fault = fmt.Sprintf("%d %.200s", status, body)
		}
	}
	return nil
}

// read takes one answer that says its length, which keybroker's always do.
func (c *client) read() (status int, body []byte, err error) {
	length := -1
	for first := true; ; first = false {
		line, err := c.reader.ReadSlice('\n')
		if err != nil {
			return 0, nil, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if first {
			if len(line) < 12 {
				return 0, nil, fmt.Errorf("not an answer: %q", line)
			}
			status, err = strconv.Atoi(string(line[9:12]))
			if err != nil {
				return 0, nil, err
			}
			continue
		}
		if len(line) == 0 {
			break
		}
		if colon := bytes.IndexByte(line, ':'); colon == len("content-length") && bytes.EqualFold(line[:colon], []byte("content-length")) {
			length, err = strconv.Atoi(string(bytes.TrimSpace(line[colon+1:])))
			if err != nil {
				return 0, nil, err
			}
		}
	}
	if length < 0 {
		return 0, nil, errors.New("an answer without Content-Length")
	}
	if length > len(c.body) {
		c.body = make([]byte, length)
	}
	_, err = io.ReadFull(c.reader, c.body[:length])
	return status, c.body[:length], err
}

func (c *client) addTo(r *result) {
	r.Answers += c.answers
	r.Faults += c.faults
	r.TotalUS += float64(c.total) / 1e3
	if r.Fault == "" {
		r.Fault = c.fault
	}
	for i, count := range c.latencies {
		if count > 0 {
			r.Latencies[strconv.Itoa(i)] += count
		}
	}
}

// respond answers every request, all of which have one size, with the same bytes.
func respond(o order, settings *tls.Config, input io.Reader) error {
	listener, err := tls.Listen("tcp", o.Address, settings)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				request := make([]byte, len(o.Requests[0]))
				for {
					if _, err := io.ReadFull(conn, request); err != nil {
						return
					}
					if _, err := conn.Write(o.Answer); err != nil {
						return
					}
				}
			}()
		}
	}()
	fmt.Println("measuring")
	_, err = io.Copy(io.Discard, input)
	return err
}

// cpuTime is what this process has used so far, in seconds.
func cpuTime() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}
