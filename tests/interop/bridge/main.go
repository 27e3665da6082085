// Command bridge lets programs that speak only TCP talk QUIC, with quic-go as the QUIC stack.
//
//	bridge client --listen TCP --dial UDP --ca FILE   each TCP connection becomes a QUIC connection with one stream
//	bridge server --listen UDP --dial TCP --cert FILE --key FILE   each QUIC stream becomes a TCP connection
//
// It knows nothing of MQTT beyond the ALPN: bytes pass unchanged, the end of each direction passes on its own, and an
// error on one side becomes a reset on the other. Events go to standard output, one JSON object a line. The program
// ends when its standard input does, so it never outlives the test that started it, or on SIGTERM or SIGINT.
//
// Events. Both halves: listening {address}. Client: connected {id, local, remote, alpn, resumed, early, used_0rtt},
// failed {id, error}, closed {id, error}. Server: connected {id, remote, alpn, resumed, used_0rtt},
// stream {id, stream}, stream_closed {id, stream, error}, closed {id}. An id counts connections from 1; `error` is
// empty after an orderly end; `early` says that bytes were sent in 0-RTT, `used_0rtt` that they were accepted. With
// --early a server may report a stream before its connection, for that is how they arrive.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lucas-clemente/quic-go"
)

const (
	// Application error codes, seen by the peer when a stream or connection ends otherwise than by its end.
	codeNone   = 0
	codeFailed = 1

	// How long the client leaves a connection open after both directions have ended, for the peer to close it.
	// quic-go cannot tell when the last bytes were acknowledged, and closing at once would lose them.
	lastBytes = 500 * time.Millisecond

	earlyBytes = 4096

	// Longer than a machine of tests stands still; quic-go's own is 5 s.
	handshakeIdle = 30 * time.Second
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()

	err := run(ctx, os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bridge:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "client" {
		return runClient(ctx, args[1:])
	}
	if len(args) > 0 && args[0] == "server" {
		return runServer(ctx, args[1:])
	}
	return errors.New("the first argument is client or server")
}

// reporter writes events; it may be used from many goroutines.
type reporter struct {
	mu sync.Mutex
}

type fields map[string]any

func (r *reporter) report(event string, more fields) {
	line := fields{"event": event}
	for key, value := range more {
		if err, ok := value.(error); ok {
			value = err.Error()
		} else if value == nil {
			value = ""
		}
		line[key] = value
	}
	text, err := json.Marshal(line)
	if err != nil {
		panic(err) // only strings, numbers and booleans are reported
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// a reader that has gone ends the program through standard input, so nothing is done about an error here
	_, _ = os.Stdout.Write(append(text, '\n'))
}

// options are what both halves take from the command line.
type options struct {
	listen, dial, alpn string
	early              bool
	idle, keepalive    time.Duration
	streams            int64
}

func (o *options) define(set *flag.FlagSet) {
	set.StringVar(&o.listen, "listen", "127.0.0.1:0", "`address` to listen on")
	set.StringVar(&o.dial, "dial", "", "`address` to dial")
	set.StringVar(&o.alpn, "alpn", "mqtt", "application protocols, separated by commas")
	set.BoolVar(&o.early, "early", false, "send (client) or accept (server) 0-RTT data")
	set.DurationVar(&o.idle, "idle", 2*time.Minute, "QUIC idle timeout")
	set.DurationVar(&o.keepalive, "keepalive", 0, "period of QUIC PINGs, 0 for none")
	set.Int64Var(&o.streams, "streams", 100, "bidirectional streams that the peer may have open")
}

// parse reads args and checks that every named flag was given.
func parse(set *flag.FlagSet, args []string, required ...string) error {
	if err := set.Parse(args); err != nil {
		return err
	}
	if set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	for _, name := range required {
		if set.Lookup(name).Value.String() == "" {
			return fmt.Errorf("--%s is missing", name)
		}
	}
	return nil
}

func (o *options) protocols() []string { return strings.Split(o.alpn, ",") }

func (o *options) quic() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout: handshakeIdle,
		MaxIdleTimeout:       o.idle,
		KeepAlivePeriod:      o.keepalive,
		MaxIncomingStreams:   o.streams,
	}
}

// whenDone calls action once ctx ends, unless release was called before.
func whenDone(ctx context.Context, action func()) (release func()) {
	released := make(chan struct{})
	go func() {
		select {
		case <-ctx.Done():
			action()
		case <-released:
		}
	}()
	return func() { close(released) }
}

// relay copies both ways until both directions have ended, and returns the first error. An end of input is passed on
// to the other side; an error resets both.
func relay(tcp *net.TCPConn, stream quic.Stream) error {
	results := make(chan error, 2)
	go func() {
		_, err := io.Copy(stream, tcp)
		if err == nil {
			err = stream.Close()
		}
		results <- err
	}()
	go func() {
		_, err := io.Copy(tcp, stream)
		if err == nil {
			// fails only when the peer has reset the connection, which the other direction sees too
			_ = tcp.CloseWrite()
		}
		results <- err
	}()

	first := <-results
	if first != nil {
		reset(tcp, stream)
	}
	second := <-results
	if first == nil && second != nil {
		first = second
		reset(tcp, stream)
	}
	return first
}

// reset ends both sides so that their peers see an error; it may be called after an orderly end, too.
func reset(tcp *net.TCPConn, stream quic.Stream) {
	stream.CancelRead(codeFailed)
	stream.CancelWrite(codeFailed)
	_ = tcp.SetLinger(0)
	_ = tcp.Close()
}

type client struct {
	options
	reporter
	tls *tls.Config
}

func runClient(ctx context.Context, args []string) error {
	var c client
	var caFile, serverName string
	var resume bool
	set := flag.NewFlagSet("bridge client", flag.ContinueOnError)
	c.define(set)
	set.StringVar(&caFile, "ca", "", "PEM `file` with the authorities that the server must come from")
	set.StringVar(&serverName, "server-name", "", "name that the certificate must hold (default: the host of --dial)")
	set.BoolVar(&resume, "resume", false, "resume TLS sessions; --early includes it")
	if err := parse(set, args, "dial", "ca"); err != nil {
		return err
	}

	pem, err := os.ReadFile(caFile)
	if err != nil {
		return err
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%s holds no certificate", caFile)
	}
	if serverName == "" {
		if serverName, _, err = net.SplitHostPort(c.dial); err != nil {
			return err
		}
	}
	c.tls = &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: c.protocols(),
		RootCAs:    authorities,
		ServerName: serverName,
	}
	if resume || c.early {
		c.tls.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}

	listener, err := net.Listen("tcp", c.listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	release := whenDone(ctx, func() { listener.Close() })
	defer release()
	c.report("listening", fields{"address": listener.Addr().String()})

	var connections sync.WaitGroup
	defer connections.Wait()
	for id := 1; ; id++ {
		accepted, err := listener.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		connections.Add(1)
		go func(id int) {
			defer connections.Done()
			c.serve(ctx, id, accepted.(*net.TCPConn))
		}(id)
	}
}

// serve carries one TCP connection and closes it.
func (c *client) serve(ctx context.Context, id int, tcp *net.TCPConn) {
	defer tcp.Close()
	release := whenDone(ctx, func() { tcp.Close() })
	defer release()

	// What goes out in 0-RTT has to be there before the dial.
	var first []byte
	if c.early {
		first = make([]byte, earlyBytes)
		count, err := tcp.Read(first)
		if err != nil {
			c.report("failed", fields{"id": id, "error": fmt.Errorf("nothing to send: %w", err)})
			return
		}
		first = first[:count]
	}

	session, err := c.connect(ctx, first)
	if err != nil {
		c.report("failed", fields{"id": id, "error": err})
		return
	}
	defer session.close()
	state := session.ConnectionState().TLS
	c.report("connected", fields{
		"id":        id,
		"local":     session.socket.LocalAddr().String(),
		"remote":    session.RemoteAddr().String(),
		"alpn":      state.NegotiatedProtocol,
		"resumed":   state.DidResume,
		"early":     session.early,
		"used_0rtt": state.Used0RTT,
	})

	release = whenDone(ctx, func() { _ = session.CloseWithError(codeNone, "") })
	defer release()
	err = relay(tcp, session.stream)
	if err == nil {
		wait := time.NewTimer(lastBytes)
		defer wait.Stop()
		select {
		case <-session.Context().Done():
		case <-wait.C:
		case <-ctx.Done():
		}
	}
	c.report("closed", fields{"id": id, "error": err})
}

// session is an established connection with its one stream, on a socket of its own.
type session struct {
	quic.Connection
	socket *net.UDPConn
	stream quic.Stream
	early  bool
}

func (s *session) close() {
	_ = s.CloseWithError(codeNone, "")
	_ = s.socket.Close()
}

// connect dials, opens the stream and writes first to it: in 0-RTT when early data is on and a ticket allows, and
// once more after the handshake when the server rejected it.
func (c *client) connect(ctx context.Context, first []byte) (_ *session, err error) {
	remote, err := net.ResolveUDPAddr("udp", c.dial)
	if err != nil {
		return nil, err
	}
	family := "udp4"
	if remote.IP.To4() == nil {
		family = "udp6"
	}
	socket, err := net.ListenUDP(family, nil)
	if err != nil {
		return nil, err
	}
	s := &session{socket: socket}
	defer func() {
		if err != nil {
			if s.Connection != nil {
				_ = s.CloseWithError(codeFailed, err.Error())
			}
			_ = socket.Close()
		}
	}()

	if !c.early {
		s.Connection, err = quic.DialContext(ctx, socket, remote, c.dial, c.tls, c.quic())
		if err != nil {
			return nil, err
		}
		s.stream, err = s.OpenStreamSync(ctx)
		return s, err
	}

	dialled, err := quic.DialEarlyContext(ctx, socket, remote, c.dial, c.tls, c.quic())
	if err != nil {
		return nil, err
	}
	s.Connection = dialled
	// without a usable ticket the dial returns when the handshake is complete
	s.early = dialled.HandshakeComplete().Err() == nil
	err = s.begin(ctx, first)
	if err == nil || errors.Is(err, quic.Err0RTTRejected) {
		select {
		case <-dialled.HandshakeComplete().Done():
		case <-dialled.Context().Done():
			return nil, errors.New("the connection ended during its handshake")
		}
		if rejected := err != nil || s.early && !dialled.ConnectionState().TLS.Used0RTT; rejected {
			s.Connection = dialled.NextConnection()
			err = s.begin(ctx, first)
		}
	}
	return s, err
}

// begin opens the stream and writes first to it.
func (s *session) begin(ctx context.Context, first []byte) (err error) {
	if s.stream, err = s.OpenStreamSync(ctx); err != nil {
		return err
	}
	_, err = s.stream.Write(first)
	return err
}

type server struct {
	options
	reporter
}

func runServer(ctx context.Context, args []string) error {
	var s server
	var certificateFile, keyFile string
	var retry bool
	set := flag.NewFlagSet("bridge server", flag.ContinueOnError)
	s.define(set)
	set.StringVar(&certificateFile, "cert", "", "PEM `file` with the certificate chain")
	set.StringVar(&keyFile, "key", "", "PEM `file` with its key")
	set.BoolVar(&retry, "retry", false, "validate each new client's address with a Retry packet")
	if err := parse(set, args, "dial", "cert", "key"); err != nil {
		return err
	}
	certificate, err := tls.LoadX509KeyPair(certificateFile, keyFile)
	if err != nil {
		return err
	}
	security := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		NextProtos:   s.protocols(),
		Certificates: []tls.Certificate{certificate},
	}
	config := s.quic()
	config.RequireAddressValidation = func(net.Addr) bool { return retry }

	listener, err := s.open(security, config)
	if err != nil {
		return err
	}
	defer listener.close()
	release := whenDone(ctx, listener.close)
	defer release()
	s.report("listening", fields{"address": listener.address.String()})

	var connections sync.WaitGroup
	defer connections.Wait()
	for id := 1; ; id++ {
		accepted, err := listener.accept(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		connections.Add(1)
		go func(id int) {
			defer connections.Done()
			s.serve(ctx, id, accepted)
		}(id)
	}
}

// listener is what quic.Listener and quic.EarlyListener have in common.
type listener struct {
	address net.Addr
	accept  func(context.Context) (quic.Connection, error)
	close   func()
}

func (s *server) open(security *tls.Config, config *quic.Config) (*listener, error) {
	if !s.early {
		plain, err := quic.ListenAddr(s.listen, security, config)
		if err != nil {
			return nil, err
		}
		return &listener{plain.Addr(), plain.Accept, func() { _ = plain.Close() }}, nil
	}
	early, err := quic.ListenAddrEarly(s.listen, security, config)
	if err != nil {
		return nil, err
	}
	accept := func(ctx context.Context) (quic.Connection, error) { return early.Accept(ctx) }
	return &listener{early.Addr(), accept, func() { _ = early.Close() }}, nil
}

// serve carries the streams of one connection until the connection ends.
func (s *server) serve(ctx context.Context, id int, connection quic.Connection) {
	var running sync.WaitGroup
	running.Add(1)
	go func() {
		defer running.Done()
		s.announce(id, connection)
	}()
	for {
		stream, err := connection.AcceptStream(ctx)
		if err != nil {
			break
		}
		s.report("stream", fields{"id": id, "stream": int64(stream.StreamID())})
		running.Add(1)
		go func() {
			defer running.Done()
			err := s.carry(ctx, stream)
			s.report("stream_closed", fields{"id": id, "stream": int64(stream.StreamID()), "error": err})
		}()
	}
	_ = connection.CloseWithError(codeNone, "")
	running.Wait()
	s.report("closed", fields{"id": id})
}

// announce reports the connection when its handshake is complete, which is later than its first stream with 0-RTT.
func (s *server) announce(id int, connection quic.Connection) {
	if early, ok := connection.(quic.EarlyConnection); ok {
		select {
		case <-early.HandshakeComplete().Done():
		case <-connection.Context().Done():
			return
		}
	}
	state := connection.ConnectionState().TLS
	s.report("connected", fields{
		"id":        id,
		"remote":    connection.RemoteAddr().String(),
		"alpn":      state.NegotiatedProtocol,
		"resumed":   state.DidResume,
		"used_0rtt": state.Used0RTT,
	})
}

func (s *server) carry(ctx context.Context, stream quic.Stream) error {
	var dialer net.Dialer
	dialled, err := dialer.DialContext(ctx, "tcp", s.dial)
	if err != nil {
		stream.CancelRead(codeFailed)
		stream.CancelWrite(codeFailed)
		return err
	}
	tcp := dialled.(*net.TCPConn)
	defer tcp.Close()
	release := whenDone(ctx, func() { tcp.Close() })
	defer release()
	return relay(tcp, stream)
}
